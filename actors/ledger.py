"""Every ordinal that was dispatched has exactly one fate: trained at one step, or left out with a cause.

The journal is append-only, one JSON object a line, in the run folder; `t` is in seconds since the run began. What was
sampled and not trained is waste, counted by cause.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from actors.pacer import ReadyGroup
from algorithms.bias import SelectionAudit
from algorithms.slots import Slot
from algorithms.types import GroupSummary, Update


@dataclass(slots=True)
class Waste:
    """What one cause has cost: attempts, the tokens that they had sampled, and the seconds that they took."""

    attempts: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Ledger:
    """The journal, and the counts that the metrics and the summary report."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._started = time.monotonic()
        self._dispatched: dict[int, float] = {}  # when the latest attempt began
        self._trained: Counter[int] = Counter()
        self._left_out: dict[int, str] = {}
        self.num_redispatched = 0
        self.num_resumed = 0
        self.num_late = 0
        """Groups that arrived after another attempt of theirs had been accepted: dropped, never trained."""
        self.waste: dict[str, Waste] = {}
        self.audit = SelectionAudit()
        """Whether what is trained differs from what is sampled."""

    @property
    def num_trained(self) -> int:
        return sum(self._trained.values())

    @property
    def num_duplicated(self) -> int:
        return sum(count - 1 for count in self._trained.values())

    def num_left_out(self, cause: str) -> int:
        return sum(other == cause for other in self._left_out.values())

    @property
    def num_quarantined(self) -> int:
        return self.num_left_out("quarantined")

    def lost(self) -> set[int]:
        """Ordinals without a fate; empty when the run is over."""
        return set(self._dispatched) - set(self._trained) - set(self._left_out)

    # Attempts ----------------------------------------------------------------------------------------------------

    def dispatched(self, slot: Slot, replica: int) -> None:
        self._dispatched[slot.ordinal] = self._now()
        self.num_redispatched += slot.attempt > 0 and not slot.resumed
        self.num_resumed += slot.resumed
        self._write("dispatched", slot.ordinal, attempt=slot.attempt, replica=replica, version=slot.version)

    def scored(self, summary: GroupSummary) -> None:
        self._write(
            "scored",
            summary.ordinal,
            attempt=summary.attempt,
            tokens_by_version={str(version): count for version, count in summary.tokens_by_version.items()},
            lengths=summary.num_loss_tokens_G,
            num_prompt_tokens=summary.num_prompt_tokens,
            generate_s=round(summary.generate_s, 6),
            score_s=round(summary.score_s, 6),
        )

    def interrupted(self, slot: Slot, num_tokens: int) -> None:
        """The attempt goes on elsewhere with the tokens that it has."""
        self._write("interrupted", slot.ordinal, attempt=slot.attempt, tokens=num_tokens)

    def stopped(self, slot: Slot, num_tokens: int, seconds: float) -> None:
        """The run is over and does not need the attempt any more."""
        self._waste("surplus", num_tokens, seconds)
        self._write("stopped", slot.ordinal, attempt=slot.attempt, tokens=num_tokens)

    def failed(self, slot: Slot, cause: str) -> None:
        self._waste("failed", 0, self._now() - self._dispatched[slot.ordinal])
        self._write("failed", slot.ordinal, attempt=slot.attempt, cause=cause)

    def late(self, slot: Slot, num_tokens: int) -> None:
        self.num_late += 1
        self._waste("late", num_tokens, 0.0)
        self._write("late", slot.ordinal, attempt=slot.attempt, tokens=num_tokens)

    def requeued(self, slot: Slot, lengths: Sequence[int], rewards: Sequence[float | None], seconds: float) -> None:
        """The attempt could not be trained in time; its prompt is sampled again."""
        self.audit.left_out("requeued", lengths, rewards)
        self._waste("requeued", sum(lengths), seconds)
        self._write("requeued", slot.ordinal, attempt=slot.attempt, lengths=list(lengths))

    # Fates -------------------------------------------------------------------------------------------------------

    def quarantined(self, slot: Slot, cause: str) -> None:
        self._left_out[slot.ordinal] = "quarantined"
        self._write("quarantined", slot.ordinal, attempt=slot.attempt, cause=cause)

    def filtered(self, group: GroupSummary, cause: str) -> None:
        """The group was sampled and scored, and is not trained: no signal, stale, or surplus."""
        self._left_out[group.ordinal] = cause
        self.audit.left_out(cause, group.num_loss_tokens_G, group.rewards_G)
        self._waste(cause, sum(group.num_loss_tokens_G), group.generate_s)
        self._write("filtered", group.ordinal, attempt=group.attempt, cause=cause)

    def unneeded(self, ordinals: Iterable[int]) -> None:
        """The run is over; over-sampled groups that had not come in time have been stopped."""
        for ordinal in ordinals:
            self._left_out[ordinal] = "surplus"
            self._write("filtered", ordinal, cause="surplus")

    def trained(self, groups: Sequence[ReadyGroup], update: Update, oldest_version: int) -> None:
        """The update is made and published; its groups are never trained again.

        Tokens of weights older than `oldest_version` were masked.
        """
        for group in groups:
            summary = group.summary
            self._trained[group.slot.ordinal] += 1
            self.audit.trained(summary.num_loss_tokens_G, summary.rewards_G)
            masked = sum(count for version, count in summary.tokens_by_version.items() if version < oldest_version)
            if masked:
                share = masked / sum(summary.num_loss_tokens_G)
                self._waste("masked", masked, summary.generate_s * share)
            self._write("trained", group.slot.ordinal, step=update.step, version=update.version)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _now(self) -> float:
        return time.monotonic() - self._started

    def _waste(self, cause: str, tokens: int, seconds: float) -> None:
        waste = self.waste.setdefault(cause, Waste())
        waste.attempts += 1
        waste.tokens += tokens
        waste.seconds += seconds

    def _write(self, event: str, ordinal: int, **details: object) -> None:
        line = {"event": event, "ordinal": ordinal, "t": round(self._now(), 4), **details}
        self._file.write(json.dumps(line) + "\n")
