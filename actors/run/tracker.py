"""A run is tracked by Weights & Biases only when its recipe asks; the run folder has every metric in any case."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

_FINISH_TIMEOUT_S = 120.0
"""A run does not wait longer for its last metrics to be uploaded; `wandb sync` can do that later."""


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
        """The key comes from the environment (WANDB_API_KEY); WANDB_MODE=offline keeps everything in `folder`."""
        self._run: Any = None
        if project is not None:
            import wandb

            settings = wandb.Settings(finish_timeout=_FINISH_TIMEOUT_S)
            self._run = wandb.init(project=project, name=name, dir=str(folder), config=dict(config), settings=settings)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log(dict(metrics), step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(kind is not None))
