"""The pipeline depth follows how far off policy the samples are measured to be, and never leaves [lowest, highest].

A deeper pipeline keeps the replicas busier and makes the samples staler. Like the window of a TCP connection, the depth
grows by addition and shrinks by multiplication: it comes back fast when it was too deep, and feels its way up.
"""

import math
from dataclasses import dataclass, replace

from algorithms.config import AdaptDepthConfig

SHRINK = 0.8
_ENOUGH = 0.5
"""Weight that the measurements since the last change must have in a running mean before it is acted upon."""


@dataclass(slots=True)
class RunningMean:
    """The exponential mean of what was measured since it began; the first value has no more weight than it earns."""

    smoothing: float
    total: float = 0.0
    weight: float = 0.0
    """1 - smoothing^(number of values): what divides the total, as in Adam."""

    def add(self, value: float) -> None:
        self.total = self.smoothing * self.total + (1 - self.smoothing) * value
        self.weight = self.smoothing * self.weight + (1 - self.smoothing)

    @property
    def value(self) -> float | None:
        """None while too little was measured."""
        return self.total / self.weight if self.weight >= _ENOUGH else None


@dataclass(frozen=True, slots=True)
class DepthState:
    """All that a controller knows between two steps, for a checkpoint."""

    depth: int
    ess: RunningMean
    kl: RunningMean


class DepthController:
    """One change of depth per body of evidence: after each, the running means start anew."""

    def __init__(self, config: AdaptDepthConfig, lowest: int, highest: int, depth: int) -> None:
        """`lowest` and `highest` bound the depth (groups in flight or waiting); `depth` is where it starts."""
        assert 1 <= lowest <= highest, f"no depth lies in [{lowest}, {highest}]"
        self._config = config
        self._lowest, self._highest = lowest, highest
        self.depth = min(max(depth, lowest), highest)
        self._start_anew()

    def update(self, ess: float | None, kl: float | None) -> int:
        """The depth from now on, after a step that measured `ess` (`sampling/ess`) and `kl`; None is not measured.

        It shrinks when the effective sample size is under the band or the KL divergence too large, at once when either
        is NaN, grows when the effective sample size is over the band, and else stays.
        """
        measured = [value for value in (ess, kl) if value is not None]
        if not measured:
            return self.depth
        if any(map(math.isnan, measured)):
            return self._change(self._shallower())
        if ess is not None:
            self._ess.add(ess)
        if kl is not None:
            self._kl.add(kl)
        mean_ess, mean_kl = self._ess.value, self._kl.value
        over = self._config.kl_max is not None and mean_kl is not None and mean_kl > self._config.kl_max
        if over or (mean_ess is not None and mean_ess < self._config.ess_low):
            return self._change(self._shallower())
        if mean_ess is not None and mean_ess > self._config.ess_high:
            return self._change(self.depth + max(1, self._lowest // 4))
        return self.depth

    def state(self) -> DepthState:
        return DepthState(self.depth, replace(self._ess), replace(self._kl))

    def restore(self, state: DepthState) -> None:
        """Go on from a snapshot; the bounds are those of now."""
        self.depth = min(max(state.depth, self._lowest), self._highest)
        self._ess, self._kl = replace(state.ess), replace(state.kl)

    def _shallower(self) -> int:
        return min(int(self.depth * SHRINK), self.depth - 1)

    def _change(self, depth: int) -> int:
        self.depth = min(max(depth, self._lowest), self._highest)
        self._start_anew()
        return self.depth

    def _start_anew(self) -> None:
        self._ess = RunningMean(self._config.smoothing)
        self._kl = RunningMean(self._config.smoothing)
