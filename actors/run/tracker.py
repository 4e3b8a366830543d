"""A run is tracked by Weights & Biases only when its recipe asks; the run folder has every metric in any case.

However often the run goes on, and from whatever step, it is one run there: its id lies in the run folder. W&B drops
what is logged for a step that it has passed, so the step is a metric of ours, over which all others are drawn; what a
run took twice, because it went back, is there twice.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

_FINISH_TIMEOUT_S = 120.0
"""A run does not wait longer for its last metrics to be uploaded; `wandb sync` can do that later."""


_STEP = "step"


def _run_id(folder: Path, new: str) -> str:
    """Of the run in the folder, there; `new` when it has none yet."""
    path = folder / "wandb_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.write_text(new + "\n", encoding="utf-8")
    return new


def check_tracker(project: str | None) -> None:
    """ValueError when a project is asked for and there is no key to reach it with."""
    if project is None or os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    if not wandb.api.api_key:
        raise ValueError(
            "logging.wandb_project: there is no Weights & Biases key; set WANDB_API_KEY, or WANDB_MODE=offline to keep "
            "the metrics in the run folder"
        )


class Tracker:
    """Metrics of each step, sent to a project or, without one, nowhere."""

    def __init__(self, project: str | None, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        """The key comes from the environment (WANDB_API_KEY).

        WANDB_MODE=offline keeps everything in `folder`, in a folder of its own for each process of the run.
        """
        self._run: Any = None
        if project is not None:
            import wandb

            settings = wandb.Settings(finish_timeout=_FINISH_TIMEOUT_S)
            run_id = _run_id(folder, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8))
            self._run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(config),
                settings=settings,
                allow_val_change=True,  # a run that goes on may have other pools, say
            )
            self._run.define_metric(_STEP, hidden=True)
            self._run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log({_STEP: step, **metrics})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(kind is not None))
