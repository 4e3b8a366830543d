"""What the pacer hands out and takes in: leave to sample a group, scored groups in order of age, batches, snapshots."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import nsmallest


@dataclass(frozen=True, slots=True)
class Slot:
    """Leave to sample one group: prompt `ordinal`, for the `attempt`-th time, at weights no older than `version`."""

    ordinal: int
    attempt: int
    version: int
    resumed: bool = False
    """The group goes on from the tokens that an interrupted attempt has left; the oldest are of `version`."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What leaves the pacer when a batch is taken: every ordinal is in one of the three."""

    batch: tuple[int, ...]
    """Ordinals to train on at `next_version`, oldest first."""
    requeued: tuple[Slot, ...] = ()
    """Attempts that can no longer be trained in time, finished or not; their prompts are planned again."""
    left_out: tuple[int, ...] = ()
    """Finished groups that leave the run untrained, for the cause `left_out_cause`."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A scored group and the oldest and newest version among its tokens."""

    slot: Slot
    oldest_version: int
    newest_version: int


@dataclass(frozen=True, slots=True)
class PacerState:
    """All that a pacer knows between two calls, for a checkpoint."""

    next_version: int
    batches_left: int
    next_ordinal: int
    unfinished: tuple[Slot, ...]
    """Planned again or in flight."""
    ready: tuple[Ready, ...]


class ReadyGroups:
    """The scored groups, in order of their oldest token's version (their date) and then of their ordinal."""

    def __init__(self) -> None:
        self._by_date: dict[int, dict[int, Ready]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Ready]:
        for date in sorted(self._by_date):
            yield from self._by_date[date].values()

    @property
    def dates(self) -> Iterable[int]:
        return self._by_date

    def count(self, date: int) -> int:
        return len(self._by_date.get(date, ()))

    def add(self, group: Ready) -> None:
        self._by_date.setdefault(group.oldest_version, {})[group.slot.ordinal] = group
        self._count += 1

    def pop_oldest(self, count: int) -> list[Ready]:
        popped: list[Ready] = []
        for date in sorted(self._by_date):
            groups = self._by_date[date]
            popped += [groups[ordinal] for ordinal in nsmallest(count - len(popped), groups)]
            if len(popped) == count:
                break
        self._remove(popped)
        return popped

    def pop_if(self, leaves: Callable[[Ready], bool]) -> list[Ready]:
        popped = [group for group in self if leaves(group)]
        self._remove(popped)
        return popped

    def _remove(self, groups: Iterable[Ready]) -> None:
        for group in groups:
            same_date = self._by_date[group.oldest_version]
            del same_date[group.slot.ordinal]
            if not same_date:
                del self._by_date[group.oldest_version]
            self._count -= 1
