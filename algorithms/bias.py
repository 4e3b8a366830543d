"""What is trained is compared with what was dispatched: no rollout leaves the run without being counted here.

A scheduler that drops what is late drops what is long. The audit measures that: it holds a uniform sample and exact
counts of the lengths and rewards of each fate (trained, or left out for a cause), however long the run. A length is in
sampled tokens; that of an aborted rollout is the tokens so far, a lower bound.

Legend: V = values of a sample, X = points at which two distributions are compared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
from numpy.typing import NDArray

CAPACITY = 4096
"""Values that are kept of each fate."""
MIN_ROLLOUTS = 50
"""Fewer rollouts than this on either side are no evidence."""
MAX_P = 0.01

_FIXES = {
    "requeued": "set staleness.when_stale to 'pace', or raise staleness.max_staleness",
    "stale": "set staleness.when_stale to 'pace', or raise staleness.max_staleness",
    "surplus": "lower staleness.over_sampling, or raise staleness.max_staleness",
}
"""The causes that the scheduler chooses, not the user, and what ends each."""
_UNFINISHED = frozenset({"requeued"})
"""Causes under which rollouts are aborted: their lengths are lower bounds, and no filter has seen them."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How many rollouts, and their mean; None of none."""

    num: int
    mean: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Lengths, or rewards: `dispatched` is `trained` and everything that was left out."""

    dispatched: Tally
    trained: Tally
    left_out: Mapping[str, Tally]
    """By cause."""
    ks: float | None
    """Kolmogorov-Smirnov distance between dispatched and trained, 0 to 1; None when either is empty."""


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Unscorable rollouts have a length and no reward."""

    lengths: Comparison
    rewards: Comparison


@dataclass(frozen=True, slots=True)
class FateState:
    """The sample and the sums of one fate."""

    num: int
    num_groups: int
    total: float
    squares: float
    group_squares: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FatesState:
    """Lengths, or rewards."""

    random: tuple[int, ...]
    """State of the generator that chooses which values are kept (Mersenne Twister)."""
    trained: FateState
    left_out: dict[str, FateState]


@dataclass(frozen=True, slots=True)
class AuditState:
    """All that an audit knows, for a checkpoint."""

    lengths: FatesState
    rewards: FatesState


class SelectionAudit:
    """Every group attempt is reported once: as trained, or as left out for a cause. Memory is bounded."""

    def __init__(self, capacity: int = CAPACITY, seed: int = 0, threshold: float = 0.05) -> None:
        """Args:
        capacity: values kept of each fate; counts and means stay exact beyond it.
        seed: of the choice which values are kept.
        threshold: distance of the length distributions that is worth a warning.
        """
        self._threshold = threshold
        self._lengths = _Fates(capacity, seed)
        self._rewards = _Fates(capacity, seed)

    def trained(self, lengths: Sequence[int], rewards: Sequence[float | None]) -> None:
        """The rollouts of a group that was trained."""
        self._lengths.trained.add(lengths)
        self._rewards.trained.add(rewards)

    def left_out(self, cause: str, lengths: Sequence[int], rewards: Sequence[float | None]) -> None:
        """The rollouts of an attempt that will not be trained; aborted ones have the tokens so far and no rewards."""
        self._lengths.of(cause).add(lengths)
        self._rewards.of(cause).add(rewards)

    def state(self) -> AuditState:
        return AuditState(self._lengths.state(), self._rewards.state())

    def restore(self, state: AuditState) -> None:
        """Go on counting from a snapshot."""
        self._lengths.restore(state.lengths)
        self._rewards.restore(state.rewards)

    def report(self) -> AuditReport:
        return AuditReport(self._lengths.compare(), self._rewards.compare())

    def metrics(self) -> dict[str, float]:
        """`bias/*`; one without a value is left out."""
        report = self.report()
        metrics = {
            "bias/length_ks": report.lengths.ks,
            "bias/reward_ks": report.rewards.ks,
            "bias/length_mean/trained": report.lengths.trained.mean,
            "bias/length_mean/dispatched": report.lengths.dispatched.mean,
        }
        return {name: value for name, value in metrics.items() if value is not None}

    def warning(self) -> str | None:
        """One sentence on the worst bias that the scheduler causes; None when there is no evidence of one.

        A cause is worth a warning when leaving its rollouts out moves the length distribution by more than the
        threshold, and chance would not (p < 0.01). What the user's own filters leave out is never warned of.
        """
        shifts = {cause: self._shift(cause) for cause in _FIXES if cause in self._lengths.left_out}
        cause = max(shifts, key=lambda cause: shifts[cause], default=None)
        if cause is None or shifts[cause] <= self._threshold:
            return None
        left, trained = self._lengths.left_out[cause], self._lengths.trained
        bound = "at least " if cause in _UNFINISHED else ""
        return (
            f"the scheduler changes which lengths are trained: the {left.num} rollouts left out as '{cause}' have "
            f"{bound}{left.mean:.0f} tokens on average, the {trained.num} trained ones {trained.mean:.0f} (their "
            f"distribution is shifted by {shifts[cause]:.2f}); {_FIXES[cause]}"
        )

    def _shift(self, cause: str) -> float:
        """How far leaving out this cause's rollouts moves the length distribution; 0 when chance explains it."""
        left, kept = self._lengths.left_out[cause], [self._lengths.trained]
        if cause in _UNFINISHED:
            # A filter judges what has finished. What it left out had been kept by the scheduler.
            kept += [other for name, other in self._lengths.left_out.items() if name not in _FIXES]
        num_kept = sum(fate.num for fate in kept)
        if self._lengths.trained.num < MIN_ROLLOUTS or left.num < MIN_ROLLOUTS:
            return 0.0
        # A lower bound of a length can show that it is longer, and never that it is shorter.
        one_sided = cause in _UNFINISHED
        distance = _distance([left], kept, one_sided=one_sided)
        if _p_value(distance, _num_independent([left]), _num_independent(kept), one_sided=one_sided) >= MAX_P:
            return 0.0
        # all = (1 - share) kept + share left, so the distance of all from kept is that of left from kept, by its share.
        return distance * left.num / (num_kept + left.num)


def _square(value: float) -> float:
    """Infinity where it is too large: a reward may be any finite number, and ** would raise."""
    return value * value


@dataclass(slots=True)
class _Fate:
    """A uniform sample of all values that were added (Vitter's algorithm R), and exact sums over all of them."""

    capacity: int
    random: Random
    num: int = 0
    num_groups: int = 0
    total: float = 0.0
    squares: float = 0.0
    """Sum of the squared values."""
    group_squares: float = 0.0
    """Sum over the groups of (sum of the group)^2 / its size."""
    values: list[float] = field(default_factory=list)

    def add(self, values_G: Iterable[float | None]) -> None:
        known = [float(value) for value in values_G if value is not None]
        if not known:
            return
        for value in known:
            self.num += 1
            if len(self.values) < self.capacity:
                self.values.append(value)
            elif (place := int(self.random.random() * self.num)) < self.capacity:
                self.values[place] = value
        self.num_groups += 1
        self.total += sum(known)
        self.squares += sum(value * value for value in known)
        self.group_squares += _square(sum(known)) / len(known)

    def state(self) -> FateState:
        sums = self.num, self.num_groups, self.total, self.squares, self.group_squares
        return FateState(*sums, tuple(self.values))

    def restore(self, state: FateState) -> None:
        self.num, self.num_groups = state.num, state.num_groups
        self.total, self.squares, self.group_squares = state.total, state.squares, state.group_squares
        self.values = list(state.values)

    @property
    def mean(self) -> float | None:
        return self.total / self.num if self.num else None

    @property
    def num_independent(self) -> float:
        """How many independent values the sample is worth: rollouts of one prompt resemble each other.

        The sample's size over Kish's design effect, with the intraclass correlation of a one-way analysis of variance.
        """
        if self.num_groups < 2:
            return float(self.num_groups)
        size = self.num / self.num_groups
        between = (self.group_squares - _square(self.total) / self.num) / (self.num_groups - 1)
        within = (self.squares - self.group_squares) / max(self.num - self.num_groups, 1)
        spread = between + (size - 1) * within
        correlation = min(max((between - within) / spread, 0.0), 1.0) if spread > 0 else 0.0
        mates = (size - 1) * len(self.values) / self.num
        """Others of its group that a value has in the sample."""
        return len(self.values) / (1 + mates * correlation)


class _Fates:
    """One quantity of all rollouts, by what became of them."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._random = Random(seed)
        self.trained = _Fate(capacity, self._random)
        self.left_out: dict[str, _Fate] = {}

    def of(self, cause: str) -> _Fate:
        return self.left_out.setdefault(cause, _Fate(self._capacity, self._random))

    def state(self) -> FatesState:
        left_out = {cause: fate.state() for cause, fate in self.left_out.items()}
        return FatesState(self._random.getstate()[1], self.trained.state(), left_out)

    def restore(self, state: FatesState) -> None:
        version, _, gauss = self._random.getstate()
        self._random.setstate((version, state.random, gauss))
        self.trained.restore(state.trained)
        self.left_out.clear()
        for cause, fate in state.left_out.items():
            self.of(cause).restore(fate)

    def compare(self) -> Comparison:
        everything = [self.trained, *self.left_out.values()]
        num, total = sum(fate.num for fate in everything), sum(fate.total for fate in everything)
        return Comparison(
            dispatched=Tally(num, total / num if num else None),
            trained=Tally(self.trained.num, self.trained.mean),
            left_out={cause: Tally(fate.num, fate.mean) for cause, fate in self.left_out.items()},
            ks=_distance(everything, [self.trained]) if self.trained.num else None,
        )


def _distance(left: Sequence[_Fate], right: Sequence[_Fate], *, one_sided: bool = False) -> float:
    """The largest difference of the two distribution functions; one-sided, only where `left` is the longer."""
    at_X = np.unique(np.concatenate([fate.values for fate in (*left, *right)]))
    difference_X = _distribution(right, at_X) - _distribution(left, at_X)
    return float(max(0.0, difference_X.max()) if one_sided else np.abs(difference_X).max())


def _distribution(fates: Sequence[_Fate], at_X: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of all values that is at most x; each fate has the weight of its exact count."""
    num = sum(fate.num for fate in fates)
    share_X = np.zeros(len(at_X))
    for fate in fates:
        if fate.num:
            values_V = np.sort(np.array(fate.values))
            share_X += fate.num / num * np.searchsorted(values_V, at_X, side="right") / len(values_V)
    return share_X


def _num_independent(fates: Sequence[_Fate]) -> float:
    """Of a mixture: the variance of a weighted sum of independent samples."""
    num = sum(fate.num for fate in fates)
    return 1 / sum((fate.num / num) ** 2 / fate.num_independent for fate in fates if fate.num)


def _p_value(distance: float, left: float, right: float, *, one_sided: bool) -> float:
    """Chance of such a distance between samples of these sizes from one distribution; conservative with ties.

    Kolmogorov's and Smirnov's limits with Stephens' correction for small samples (J. R. Stat. Soc. B 32, 1970).
    """
    size = math.sqrt(left * right / (left + right))
    scaled = (size + 0.12 + 0.11 / size) * distance
    if one_sided:
        return math.exp(-2 * scaled**2)
    if scaled < 0.2:  # the series converges slowly, and the chance is 1 to twelve digits
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))
