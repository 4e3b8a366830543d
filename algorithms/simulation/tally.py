"""The sums that a simulation keeps: what became of every group, and where every second went."""

from collections import defaultdict
from collections.abc import Iterable

from algorithms.simulation.config import SimulationConfig
from algorithms.simulation.replicas import Group
from algorithms.simulation.result import Amount, Sample, SimulationResult, StepRecord, bound
from algorithms.simulation.setup import Setup

_SAMPLE_SIZE = 20_000


class LengthSample:
    """Exact count and sum, and at most `_SAMPLE_SIZE` lengths: every n-th, n doubling when there are too many."""

    __slots__ = ("_count", "_kept", "_stride", "_sum")

    def __init__(self) -> None:
        self._count = self._sum = 0
        self._stride = 1
        self._kept: list[int] = []

    def extend(self, lengths: list[int]) -> None:
        self._sum += sum(lengths)
        self._kept += lengths[-self._count % self._stride :: self._stride]
        self._count += len(lengths)
        if len(self._kept) > _SAMPLE_SIZE:
            self._kept = self._kept[::2]
            self._stride *= 2

    def sample(self) -> Sample:
        return Sample(self._count, self._sum / max(1, self._count), tuple(self._kept))


class Costs:
    """Tokens and slot-seconds, growing."""

    __slots__ = ("slot_s", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.slot_s = 0.0

    def add(self, group: Group) -> None:
        self.tokens += sum(group.tokens.values())
        self.slot_s += sum(group.seconds.values())

    def amount(self) -> Amount:
        return Amount(self.tokens, self.slot_s)


class Tally:
    """Booked by the simulator; read once, by `result`."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self.num_dispatched = self.num_redispatched = self.num_failures = self._num_trained = 0
        self._num_left_out: dict[str, int] = defaultdict(int)
        self._trained, self._masked = Costs(), Costs()
        self._wasted: dict[str, Costs] = defaultdict(Costs)
        self._tokens_by_age: dict[int, int] = defaultdict(int)
        self.policy_s: dict[str, float] = defaultdict(float)
        self.slot_idle_s: dict[str, float] = defaultdict(float)
        self.busy_s = 0.0
        """Seconds of slots that decode."""
        self._dispatched_lengths, self._trained_lengths = LengthSample(), LengthSample()
        self._left_out_lengths = LengthSample()
        self._timeline: list[StepRecord] = []
        self._last = (0.0, 0.0, 0.0)  # time, busy_s and training seconds at the end of the step before

    def dispatched(self, group: Group) -> None:
        if group.slot.attempt == 0:
            self.num_dispatched += 1
            self._dispatched_lengths.extend(group.lengths)
        else:
            self.num_redispatched += 1

    def trained(self, group: Group, version: int) -> None:
        """The group is in the batch of `version`; what is older than the bound leaves the loss."""
        oldest = version - self._max_staleness
        self._num_trained += 1
        self._trained_lengths.extend(group.lengths)
        for sampled_at, tokens in group.tokens.items():
            if sampled_at >= oldest:
                self._trained.tokens += tokens
                self._tokens_by_age[version - sampled_at] += tokens
            else:
                self._masked.tokens += tokens
        for sampled_at, seconds in group.seconds.items():
            (self._trained if sampled_at >= oldest else self._masked).slot_s += seconds

    def wasted(self, group: Group, cause: str) -> None:
        """The attempt was for nothing; its ordinal may have another."""
        self._wasted[cause].add(group)
        if cause != "failed":
            self._left_out_lengths.extend(group.lengths)

    def left_out(self, group: Group, cause: str) -> None:
        """The ordinal leaves the run untrained."""
        self._num_left_out[cause] += 1
        self.wasted(group, cause)

    def step(self, now: float, num_slots: int) -> None:
        """A version was committed."""
        time, busy_s, training_s = self._last
        self._last = (now, self.busy_s, self.policy_s["training"])
        seconds = now - time
        if seconds > 0:
            busy_share = (self.busy_s - busy_s) / (seconds * num_slots)
            self._timeline.append(StepRecord(now, busy_share, (self.policy_s["training"] - training_s) / seconds))
        else:
            self._timeline.append(StepRecord(now, 0.0, 0.0))

    def result(
        self, config: SimulationConfig, setup: Setup, time_s: float, num_unfinished: int, unfinished: Iterable[Group]
    ) -> SimulationResult:
        """`unfinished`: groups under way or ready at the end, stopped; `num_unfinished`: ordinals without a fate."""
        rest = Costs()
        for group in unfinished:
            rest.add(group)
        dispatched, ages = self._dispatched_lengths.sample(), self._tokens_by_age
        max_staleness = max(ages, default=0)
        return SimulationResult(
            steps=setup.steps,
            time_s=time_s,
            num_slots=setup.num_slots,
            groups_per_batch=setup.groups_per_batch,
            bound=bound(config, setup, dispatched.mean),
            num_dispatched=self.num_dispatched,
            num_trained=self._num_trained,
            num_left_out=dict(self._num_left_out),
            num_unfinished=num_unfinished,
            num_redispatched=self.num_redispatched,
            num_failures=self.num_failures,
            trained=self._trained.amount(),
            masked=self._masked.amount(),
            wasted={cause: costs.amount() for cause, costs in self._wasted.items()},
            unfinished=rest.amount(),
            staleness=tuple(ages[age] / max(1, self._trained.tokens) for age in range(max_staleness + 1)),
            max_staleness=max_staleness,
            policy_s=dict(self.policy_s),
            # What is left of a difference by rounding is no reason.
            slot_idle_s={why: idle_s for why, idle_s in self.slot_idle_s.items() if idle_s > 1e-9 * time_s},
            lengths_dispatched=dispatched,
            lengths_trained=self._trained_lengths.sample(),
            lengths_left_out=self._left_out_lengths.sample(),
            timeline=tuple(self._timeline),
        )
