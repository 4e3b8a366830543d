"""The checkpoint with the best value of a logged metric is never removed while a better one is not there.

The value of a checkpoint is the metric's mean over the steps since the cut before it: a single step is too noisy. It is
in the checkpoint itself; `best.json` beside the checkpoints only tells, and is made anew from them.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from actors.checkpoint.config import BestConfig


class Score(msgspec.Struct, frozen=True):
    """What a checkpoint is compared by."""

    metric: str
    value: float
    num_steps: int
    """That the value is the mean of."""


@dataclass(slots=True)
class Watch:
    """The mean of a metric since the last cut."""

    metric: str
    _total: float = 0.0
    _num_steps: int = 0
    _warned: bool = field(default=False)

    def saw(self, metrics: Mapping[str, float]) -> str | None:
        """Count one step; a warning, once, when the metric is not among those of the first."""
        value = metrics.get(self.metric, math.nan)
        if math.isfinite(value):
            self._total += value
            self._num_steps += 1
            return None
        if self._warned or self._num_steps:
            return None
        self._warned = True
        close = difflib.get_close_matches(self.metric, metrics, n=3, cutoff=0.5)
        return (
            f"checkpoint.best.metric: the step has logged no '{self.metric}', and checkpoints without it are never the "
            f"best; {'did you mean ' + ' or '.join(map(repr, close)) if close else 'it logged ' + ', '.join(metrics)}?"
        )

    def take(self) -> Score | None:
        """The mean so far, which begins anew; None when no step has logged the metric, or it is no finite number."""
        total, num_steps = self._total, self._num_steps
        self._total, self._num_steps = 0.0, 0
        return Score(self.metric, total / num_steps, num_steps) if num_steps and math.isfinite(total) else None


def best_of(scores: Mapping[int, Score | None], config: BestConfig) -> int | None:
    """The version with the best value of the metric, the newest of equal ones; None when none has a value.

    A mean over less than half as many steps as another's, such as that of a run that was stopped right after a cut, may
    be the best by chance, and is not.
    """
    found = {version: score for version, score in scores.items() if score is not None and score.metric == config.metric}
    enough = max((score.num_steps for score in found.values()), default=0) / 2
    sign = 1.0 if config.mode == "max" else -1.0
    values = [(sign * score.value, version) for version, score in found.items() if score.num_steps >= enough]
    return max(values)[1] if values else None


class _Scored(msgspec.Struct):
    score: Score | None = None


def score_of(folder: Path) -> Score | None:
    """Of a committed checkpoint; None when it has none, or cannot be read."""
    try:
        return msgspec.json.decode((folder / "cut.json").read_bytes(), type=_Scored).score
    except (OSError, ValueError, RecursionError):
        return None
