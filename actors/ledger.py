"""Every ordinal that was dispatched has exactly one fate: trained at one step, or quarantined with a cause.

The journal is append-only, one JSON object a line, in the run folder.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from actors.pacer import ReadyGroup
from algorithms.pacing import Slot
from algorithms.types import GroupSummary, Update


class Ledger:
    """The journal and the counts that the summary reports."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._dispatched: set[int] = set()
        self._trained: Counter[int] = Counter()
        self._quarantined: set[int] = set()
        self.num_redispatched = 0
        self.num_late = 0
        """Groups that arrived after another attempt of theirs had been accepted: dropped, never trained."""

    @property
    def num_trained(self) -> int:
        return sum(self._trained.values())

    @property
    def num_duplicated(self) -> int:
        return sum(count - 1 for count in self._trained.values())

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def lost(self) -> set[int]:
        """Ordinals without a fate; empty when the run is over."""
        return self._dispatched - set(self._trained) - self._quarantined

    def dispatched(self, slot: Slot, replica: int) -> None:
        self._dispatched.add(slot.ordinal)
        self.num_redispatched += slot.attempt > 0
        self._write("dispatched", slot.ordinal, attempt=slot.attempt, replica=replica, version=slot.version)

    def scored(self, summary: GroupSummary) -> None:
        versions = {str(version): count for version, count in summary.tokens_by_version.items()}
        self._write("scored", summary.ordinal, attempt=summary.attempt, tokens_by_version=versions)

    def late(self, slot: Slot) -> None:
        self.num_late += 1
        self._write("late", slot.ordinal, attempt=slot.attempt)

    def failed(self, slot: Slot, cause: str) -> None:
        self._write("failed", slot.ordinal, attempt=slot.attempt, cause=cause)

    def quarantined(self, slot: Slot, cause: str) -> None:
        self._quarantined.add(slot.ordinal)
        self._write("quarantined", slot.ordinal, attempt=slot.attempt, cause=cause)

    def trained(self, groups: Sequence[ReadyGroup], update: Update) -> None:
        """The update is made and published; its groups are never trained again."""
        for group in groups:
            self._trained[group.slot.ordinal] += 1
            self._write("trained", group.slot.ordinal, step=update.step, version=update.version)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write(self, event: str, ordinal: int, **details: object) -> None:
        self._file.write(json.dumps({"event": event, "ordinal": ordinal, **details}) + "\n")
