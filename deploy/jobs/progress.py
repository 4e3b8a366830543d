"""How far a run is: from its folder where this machine sees it, or else from what it has printed."""

import json
import os
import re
from pathlib import Path

from actors.recipe.file import RecipeError, load_stored

_TAIL_BYTES = 65_536
_SHOWN = "reward", "loss"


def from_folder(run_dir: Path) -> str | None:
    """The last whole line of the run's metrics, as `12/500  reward 0.412`; None where there is none."""
    path = run_dir / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        return None
    try:
        metrics = json.loads(whole[-1])
    except ValueError:
        return None
    figures = [f"{name} {metrics[name]:.3g}" for name in _SHOWN if name in metrics]
    return "  ".join([f"{int(metrics['step']) + 1}{_of_all(run_dir)}", *figures])


def _of_all(run_dir: Path) -> str:
    try:
        return f"/{load_stored(run_dir / 'recipe.yaml').steps}"
    except RecipeError:  # of another version of this
        return ""


def from_log(log: str, run: str) -> str | None:
    """The last line of progress, without the run's name, and no more than the first figures."""
    found = re.findall(rf"^{re.escape(run)}  (\d+/\d+.*)$", log, re.MULTILINE)
    return "  ".join(found[-1].split("  ")[: 1 + len(_SHOWN)]) if found else None


def last_words(log: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(log.splitlines()) if line.strip()), "")


def seen(run_dir: str | None) -> Path | None:
    """The folder, where this machine has it."""
    return Path(run_dir) if run_dir is not None and os.path.isdir(run_dir) else None
