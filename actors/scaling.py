"""A run is asked for another number of replicas through two small files in its folder, each written whole or not.

scale.json          what somebody wants (`python -m deploy scale`); the run takes it away
scale_answer.json   what became of the last one: taken, or why not
"""

import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class ScaleFiles:
    """Both sides of the exchange."""

    folder: Path

    @property
    def request(self) -> Path:
        return self.folder / "scale.json"

    @property
    def answer(self) -> Path:
        return self.folder / "scale_answer.json"

    def ask(self, num_workers: int, timeout_s: float) -> str | None:
        """Returns when the run has taken it: None, or why it did not. TimeoutError when nobody answers; then the
        request is taken back."""
        request_id = secrets.token_hex(8)
        _write(self.request, {"id": request_id, "rollout": num_workers})
        deadline = time.monotonic() + timeout_s
        answer = None
        while answer is None or answer.get("id") != request_id:
            if time.monotonic() > deadline:
                self.request.unlink(missing_ok=True)
                raise TimeoutError
            time.sleep(_EVERY_S)
            answer = _read(self.answer)
        refused = answer.get("refused")
        return None if refused is None else str(refused)

    def clear(self) -> None:
        """What was asked of an earlier process is not asked of this one."""
        self.request.unlink(missing_ok=True)

    def take(self, refused: Callable[[int], str | None]) -> int | None:
        """The number that is asked for, once, if the run can have it; `refused` says why it cannot."""
        if not self.request.exists():
            return None
        asked = _read(self.request)
        self.request.unlink(missing_ok=True)
        wanted = None if asked is None else asked.get("rollout")
        if asked is None or not isinstance(wanted, int):
            return None
        why = refused(wanted)
        _write(self.answer, {"id": asked.get("id"), "rollout": wanted, "refused": why})
        return wanted if why is None else None


def _write(path: Path, content: dict[str, Any]) -> None:
    staged = path.with_name(f"{path.name}.{os.getpid()}.staged")
    staged.write_text(json.dumps(content) + "\n", encoding="utf-8")
    staged.rename(path)


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is none, or none of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
