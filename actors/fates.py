"""What became of every ordinal, from the journal's events alone: the run counts by them as they are written, and
`python -m deploy ledger` by reading them back."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]
"""One line of the journal: `event`, `ordinal`, `t` (seconds since the run began), and what actors/ledger.py says."""

NON_FINITE = "non_finite"
"""The cause for which groups are left out when the loss or the gradient of their step was not finite."""


@dataclass(slots=True)
class Waste:
    """What one cause has cost: attempts, the tokens that they had sampled, and the seconds that they took."""

    attempts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.attempts += 1
        self.tokens += tokens
        self.seconds += seconds


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Why an ordinal was set aside, and which row of the data set it is of."""

    row: int
    cause: str
    dispatched: bool
    """Its group has failed too often; otherwise the row could not even be a prompt."""


@dataclass(slots=True)
class Stretch:
    """The steps from where the run began, or went on, to where it went on again."""

    groups_per_batch: int | None = None
    """What the journal says that each of them takes; journals of before it was written say nothing."""
    by_step: Counter[int] = field(default_factory=Counter)
    """How many groups each has taken: trained, or left out where the step was skipped."""

    def problems(self) -> Iterator[str]:
        size = self.groups_per_batch
        if size is None:
            if len(sizes := sorted(set(self.by_step.values()))) > 1:
                yield f"steps have trained {', '.join(map(str, sizes))} groups; each must train equally many"
            return
        for step, count in sorted(self.by_step.items()):
            if count != size:
                yield f"step {step} has taken {count} groups, and groups_per_batch is {size}"


@dataclass(slots=True)
class Fates:
    """Every ordinal that was dispatched is trained once, or left out for one cause, or has no fate yet."""

    dispatched: dict[int, float] = field(default_factory=dict)
    """When the latest attempt began."""
    trained: Counter[int] = field(default_factory=Counter)
    left_out: dict[int, list[str]] = field(default_factory=dict)
    """By ordinal, the cause of each time that it was; more than one is a problem."""
    quarantined: dict[int, Quarantined] = field(default_factory=dict)
    waste: dict[str, Waste] = field(default_factory=dict)
    """By cause."""
    by_step: Counter[int] = field(default_factory=Counter)
    """How many groups each step has trained."""
    stretches: list[Stretch] = field(default_factory=lambda: [Stretch()])
    """In the order of the journal; a recipe may be given another `groups_per_batch` where it goes on."""
    skipped: set[int] = field(default_factory=set)
    """Steps that have trained nothing, because loss or gradient were not finite; their groups are left out."""
    num_redispatched: int = 0
    num_resumed: int = 0
    num_late: int = 0
    num_cuts: int = 0
    """How often the run went on from a checkpoint."""
    num_roll_backs: int = 0
    """How often a rule of health has decided to go back to one."""
    last_t: float = 0.0

    def apply(self, event: Event) -> None:
        """Count one more event."""
        kind, ordinal, t = event["event"], event["ordinal"], event["t"]
        self.last_t = t
        tokens, seconds = event.get("tokens", 0), event.get("seconds", 0.0)
        match kind:
            case "dispatched":
                self.num_resumed += event["resumed"]
                self.num_redispatched += event["attempt"] > 0 and not event["resumed"]
                self.dispatched[ordinal] = t
            case "failed":
                self.wasted(event.get("waste", "failed"), 0, t - self.dispatched[ordinal])
            case "late":
                self.num_late += 1
                self.wasted("late", tokens, 0.0)
            case "stopped":
                self.wasted("surplus", tokens, seconds)
            case "requeued":
                self.wasted("requeued", sum(event["lengths"]), seconds)
            case "quarantined":
                self._leave_out(ordinal, "quarantined")
                found = Quarantined(int(event.get("row", -1)), str(event["cause"]), ordinal in self.dispatched)
                self.quarantined[ordinal] = found
            case "filtered":
                self._leave_out(ordinal, event["cause"])
                if "step" in event:
                    self.skipped.add(event["step"])
                    self.stretches[-1].by_step[event["step"]] += 1
                if tokens:
                    self.wasted(event["cause"], tokens, seconds)
            case "trained":
                self.trained[ordinal] += 1
                self.by_step[event["step"]] += 1
                self.stretches[-1].by_step[event["step"]] += 1
                if tokens:
                    self.wasted("masked", tokens, seconds)
            case "began" | "resumed":
                self.stretches.append(Stretch(event.get("groups_per_batch")))
            case "rolled back":
                self.num_roll_backs += 1
            case "scored" | "interrupted":
                pass
            case _:
                raise ValueError(f"unknown event {kind!r}")

    def wasted(self, cause: str, tokens: int, seconds: float) -> None:
        """Count one attempt that was made in vain."""
        self.waste.setdefault(cause, Waste()).add(tokens, seconds)

    def lost(self) -> set[int]:
        """Ordinals without a fate; empty when the run is over."""
        return set(self.dispatched) - set(self.trained) - set(self.left_out)

    @property
    def num_doubled(self) -> int:
        """Fates beyond the first one of an ordinal, trained or left out; must be 0."""
        fates = self.trained.total() + sum(map(len, self.left_out.values()))
        return fates - len({*self.trained, *self.left_out})

    def passed_over(self) -> list[int]:
        """Ordinals that were neither dispatched nor left out, though later ones were; empty when the run is over."""
        known = {*self.dispatched, *self.left_out}
        return sorted(set(range(max(known, default=-1) + 1)) - known)

    def problems(self) -> Iterator[str]:
        """What must never be: an ordinal with two fates, or a fate without a dispatch, or steps of unequal size."""
        for ordinal, count in sorted(self.trained.items()):
            if count > 1:
                yield f"ordinal {ordinal} was trained {count} times"
            if ordinal in self.left_out:
                yield f"ordinal {ordinal} was trained and left out ({', '.join(self.left_out[ordinal])})"
        for ordinal, causes in sorted(self.left_out.items()):
            if len(causes) > 1:
                yield f"ordinal {ordinal} was left out {len(causes)} times ({', '.join(causes)})"
        for ordinal in sorted({*self.trained, *self.left_out} - {*self.dispatched, *self.quarantined}):
            yield f"ordinal {ordinal} has a fate and was never dispatched"
        taken: set[int] = set()
        for stretch in self.stretches:
            yield from stretch.problems()
            for step in sorted(taken & set(stretch.by_step)):
                yield f"step {step} was taken before the run went on, and after"
            taken |= set(stretch.by_step)
        steps = {*self.by_step, *self.skipped}
        if missing := sorted(set(range(len(steps))) - steps):
            yield f"step {missing[0]} has trained nothing, and was not skipped"
        for step in sorted(self.skipped & set(self.by_step)):
            yield f"step {step} was skipped, and has trained groups"

    def _leave_out(self, ordinal: int, cause: str) -> None:
        self.left_out.setdefault(ordinal, []).append(cause)
