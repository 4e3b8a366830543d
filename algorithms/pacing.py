"""No group is trained more than `max_staleness` versions after the weights that began to sample it.

The pacer is a pure state machine: no clock, no I/O, no Ray. Each prompt group has one ordinal and moves

    planned -> in flight (dispatched to a replica at a version) -> ready (scored) -> taken (into a batch)

and a group that fails goes back to planned under its ordinal with the next attempt number.

Why the bound holds. A group dispatched at version d must be in a batch that is trained at version d + K at the
latest (K = max_staleness), so d + K is its deadline, and each step trains B groups (B = groups_per_batch). With T the
version at which the next batch is trained, all deadlines can be met, whatever finishes first, as long as

    for every version v:   #{groups outstanding with d <= v}  <=  B * (v + K - T + 1)                      (1)

(the classical demand bound of earliest-deadline-first scheduling). Dispatch and take are the only moves that can break
(1), and each is allowed only if (1) still holds after it. A step takes the oldest ready groups; when (1) would break
without a group that is still in flight, the step waits for that group: nothing is dropped, so long samples are not
filtered out. The bound is about single groups; a count of outstanding work alone would let a straggler exceed it.
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Blocked = Literal["depth", "capacity", "bound", "done"]
"""Why no group may be dispatched: the pipeline is as deep as allowed, the replicas are full, one more group could not
meet its deadline, or enough groups are under way to finish the run."""

Waiting = Literal["groups", "oldest"]
"""Why no batch may be taken: too few groups are ready, or a group that must not be left behind is still in flight."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Leave to sample one group: prompt `ordinal`, for the `attempt`-th time, at weights no older than `version`."""

    ordinal: int
    attempt: int
    version: int


class Pacer:
    """Every ordinal is in exactly one state, and inequality (1) holds after every call."""

    def __init__(
        self,
        *,
        groups_per_batch: int,
        max_staleness: int,
        num_batches: int,
        pipeline_depth: int | None = None,
        max_in_flight: int | None = None,
        version: int = 0,
    ) -> None:
        """Args:
        groups_per_batch: groups that one step trains on (B).
        max_staleness: the hard bound K, in weight versions.
        num_batches: steps of the run; no group is planned that no step would train.
        pipeline_depth: most groups dispatched and not yet taken; None is B * (K + 1), all that the bound allows.
        max_in_flight: most groups that the replicas generate at once; None for no limit.
        version: the version of the policy at the start.
        """
        self.groups_per_batch = groups_per_batch
        self.max_staleness = max_staleness
        self.pipeline_depth = pipeline_depth or groups_per_batch * (max_staleness + 1)
        self.max_in_flight = max_in_flight or self.pipeline_depth
        assert self.pipeline_depth >= groups_per_batch, "a pipeline shallower than a batch never fills it"
        self.next_version = version
        """T: the version at which the next batch taken will be trained."""
        self._batches_left = num_batches
        self._next_ordinal = 0
        self._retries: deque[Slot] = deque()
        self._in_flight: dict[int, Slot] = {}
        self._ready: dict[int, int] = {}  # ordinal -> oldest version among its tokens
        self._outstanding: Counter[int] = Counter()  # version -> groups in flight or ready

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def in_flight(self) -> Mapping[int, Slot]:
        """The groups under way, by ordinal."""
        return self._in_flight

    @property
    def exhausted(self) -> bool:
        """Whether the last batch has been taken."""
        return self._batches_left == 0

    def blocked(self, version: int) -> Blocked | None:
        """Why no group may be dispatched to a replica that holds `version`; None when one may."""
        outstanding = len(self._in_flight) + len(self._ready)
        if outstanding >= self._batches_left * self.groups_per_batch:
            return "done"
        if outstanding >= self.pipeline_depth:
            return "depth"
        if len(self._in_flight) >= self.max_in_flight:
            return "capacity"
        if not self._meets_deadlines(self._outstanding + Counter({version: 1}), self.next_version):
            return "bound"
        return None

    def dispatch(self, version: int) -> Slot | None:
        """Plan the next group on a replica that holds `version`; None when `blocked(version)` says why not.

        Failed groups come first, so the oldest ordinal never waits behind new ones.
        """
        if self.blocked(version) is not None:
            return None
        if self._retries:
            failed = self._retries.popleft()
            slot = Slot(failed.ordinal, failed.attempt + 1, version)
        else:
            slot = Slot(self._next_ordinal, 0, version)
            self._next_ordinal += 1
        self._in_flight[slot.ordinal] = slot
        self._outstanding[version] += 1
        return slot

    def finished(self, slot: Slot, oldest_version: int) -> bool:
        """The group is scored and may be trained; False when it is a late duplicate of another attempt.

        `oldest_version` is the oldest version among its sampled tokens: at least the slot's, because a replica's
        version only grows.
        """
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        if oldest_version < slot.version:
            raise ValueError(
                f"group {slot.ordinal} was dispatched at version {slot.version} and holds tokens of the older version "
                f"{oldest_version}: the replica serves weights that were never committed"
            )
        self._leave_flight(slot)
        self._ready[slot.ordinal] = oldest_version
        self._outstanding[oldest_version] += 1
        return True

    def failed(self, slot: Slot) -> bool:
        """The attempt is lost; its ordinal will be dispatched again. False for a late report of another attempt."""
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        self._leave_flight(slot)
        self._retries.append(slot)
        return True

    def dropped(self, slot: Slot) -> bool:
        """The ordinal leaves the run untrained (quarantined); a new one takes its place in the batch."""
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        self._leave_flight(slot)
        return True

    def waiting(self) -> Waiting | None:
        """Why no batch may be taken; None when one may."""
        if len(self._ready) < self.groups_per_batch:
            return "groups"
        left = self._outstanding.copy()
        left.subtract(self._ready[ordinal] for ordinal in self._oldest_ready())
        return None if self._meets_deadlines(left, self.next_version + 1) else "oldest"

    def take(self) -> list[int] | None:
        """The ordinals of the next batch, oldest first, trained at `next_version`; None while `waiting()`."""
        if self.exhausted or self.waiting() is not None:
            return None
        batch = self._oldest_ready()
        for ordinal in batch:
            self._leave(self._ready.pop(ordinal))
        self.next_version += 1
        self._batches_left -= 1
        return batch

    def _oldest_ready(self) -> list[int]:
        by_age = sorted(self._ready, key=lambda ordinal: (self._ready[ordinal], ordinal))
        return by_age[: self.groups_per_batch]

    def _leave_flight(self, slot: Slot) -> None:
        del self._in_flight[slot.ordinal]
        self._leave(slot.version)

    def _leave(self, version: int) -> None:
        self._outstanding[version] -= 1
        if self._outstanding[version] == 0:
            del self._outstanding[version]

    def _meets_deadlines(self, outstanding: Mapping[int, int], next_version: int) -> bool:
        """Inequality (1), for groups outstanding by version, when the next batch is trained at `next_version`."""
        due = 0
        for version in sorted(outstanding):
            due += outstanding[version]
            if due > self.groups_per_batch * max(0, version + self.max_staleness - next_version + 1):
                return False
        return True
