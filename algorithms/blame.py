"""A prompt is to blame that fails wherever it goes, a replica where prompts fail that are well elsewhere.

Pure: replicas are numbers that are never used again, prompts are ordinals. Failures alone do not tell a replica's fault
from that of what lies behind all of them, such as a reward that never answers: then prompts fail everywhere.
"""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

MOST_IN_A_ROW = 3
"""Prompts in a row that fail on a replica and are well elsewhere. One or two may be chance, such as a reward worker
that was down for the one attempt and there for the next; each more costs a good prompt one of its attempts."""

MOST_BREAKS = 10
"""Times in a row that the connection to a replica breaks and nothing comes through there in between. Each time alone
is nobody's fault and costs a moment; so many say that a group which takes as long as ours never will."""


@dataclass(slots=True)
class _Row:
    """What has failed on one replica since something last came through there."""

    cause: str
    """Of the last failure."""
    ordinals: set[int] = field(default_factory=set)
    well_elsewhere: set[int] = field(default_factory=set)


class Blame:
    """What failed where: of a prompt until it comes through, of a replica until any does there."""

    def __init__(self) -> None:
        self._tried: dict[int, set[int]] = {}
        self._last: dict[int, int] = {}
        self._rows: dict[int, _Row] = {}
        self._breaks: Counter[int] = Counter()

    def tried(self, ordinal: int) -> Set[int]:
        """The replicas on which the prompt has failed."""
        return self._tried.get(ordinal, frozenset())

    def avoids(self, ordinal: int) -> Set[int]:
        """Where the prompt is not to go next while there is another: who fails at once is always the idlest, and would
        get every attempt."""
        return {self._last[ordinal]} if ordinal in self._last else frozenset()

    def failed(self, ordinal: int, replica: int, cause: str) -> None:
        """An attempt has failed, and neither the replica's death nor anything that is known otherwise explains it."""
        self._tried.setdefault(ordinal, set()).add(replica)
        self._last[ordinal] = replica
        row = self._rows.setdefault(replica, _Row(cause))
        row.cause = cause
        row.ordinals.add(ordinal)

    def well(self, ordinal: int, replica: int) -> list[tuple[int, str]]:
        """An attempt has come through; the replicas that are to blame now, each with what it did last."""
        self._breaks.pop(replica, None)
        if self._rows.pop(replica, None) is not None:
            self._rows.clear()  # it was failing as well until now: what has failed meanwhile proves nothing of anybody
        guilty = []
        for other in sorted(self._tried.get(ordinal, ())):
            row = self._rows.get(other)
            if row is None or ordinal not in row.ordinals:
                continue
            row.well_elsewhere.add(ordinal)
            if len(row.well_elsewhere) >= MOST_IN_A_ROW:
                del self._rows[other]
                guilty.append((other, row.cause))
        self.settled(ordinal)
        return guilty

    def broke(self, replica: int) -> bool:
        """The connection to it has broken once more; whether that is once too often."""
        self._breaks[replica] += 1
        return self._breaks[replica] >= MOST_BREAKS

    def settled(self, ordinal: int) -> None:
        """The prompt has its fate."""
        self._tried.pop(ordinal, None)
        self._last.pop(ordinal, None)
