"""What faults have come to: the counts, which add up over runs, and the table of the classes."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rich.table import Table

from tests.chaos.audit import Audit
from tests.chaos.run import Outcome

NOT_FAULTS = ("faults", "classes", "recovery_steps_max")
"""The figures that need not be 0."""


@dataclass(slots=True)
class Result:
    """What all runs together have come to."""

    outcomes: list[Outcome] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    hangs: int = 0
    unknown_version_tokens: int = 0
    silent_zero_rewards: int = 0
    untyped_exits: int = 0
    leaked: int = 0
    recovery_steps_max: int = 0
    """Most steps that were taken again after the run had gone back to a cut."""
    groups: int = 0
    left_out: int = 0
    lives: int = 0
    resumed: int = 0
    """Lives of a driver that went on after another had ended."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def add(self, found: Audit) -> None:
        self.groups += found.groups
        self.left_out += found.left_out
        self.lost += found.lost
        self.duplicated += found.duplicated
        self.unknown_version_tokens += found.unknown_version_tokens
        self.silent_zero_rewards += found.silent_zero_rewards
        self.recovery_steps_max = max(self.recovery_steps_max, found.recovery_steps_max)
        self.notes += found.notes

    def merge(self, other: Self) -> None:
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            setattr(self, part.name, max(mine, theirs) if part.name == "recovery_steps_max" else mine + theirs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values | {"outcomes": [Outcome(**outcome) for outcome in values["outcomes"]]})

    def to_json(self) -> dict[str, int]:
        names = (
            "lost", "duplicated", "hangs", "unknown_version_tokens", "silent_zero_rewards", "untyped_exits", "leaked",
            "recovery_steps_max",
        )  # fmt: skip
        classes = {outcome.name for outcome in self.outcomes}
        return {"faults": len(self.outcomes), "classes": len(classes)} | {name: getattr(self, name) for name in names}


def table(outcomes: list[Outcome]) -> Table:
    made = Table("class", "faults", "survived", "longest (s)", title="Faults")
    for name, count in sorted(Counter(outcome.name for outcome in outcomes).items()):
        mine = [outcome for outcome in outcomes if outcome.name == name]
        longest = max(outcome.seconds for outcome in mine)
        made.add_row(name, str(count), str(sum(outcome.survived for outcome in mine)), f"{longest:.1f}")
    return made
