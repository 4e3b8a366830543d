"""No token is trained more than `max_staleness` versions after the weights that sampled it.

The pacer is a pure state machine: no clock, no I/O, no Ray. Each prompt group has one ordinal and moves

    planned -> in flight (dispatched to a replica at a version) -> ready (scored) -> taken (into a batch)

An attempt that fails sends its ordinal back to planned under the next attempt number; one that is interrupted goes on
later, on another replica, from the tokens that it has.

With T the version at which the next batch is trained, K = max_staleness and B = groups_per_batch, a group whose oldest
token is of version d must be in a batch by version d + K: its deadline. `when_stale` says what keeps it:

pace     Nothing is dropped. All deadlines can be met, whatever finishes first, as long as

             for every version v:   #{groups outstanding with d <= v}  <=  B * (v + K - T + 1)                (1)

         (the classical demand bound of earliest-deadline-first scheduling). Dispatch and take are the only moves that
         can break (1), and each is allowed only if (1) still holds after it. A step takes the oldest ready groups, and
         waits for a group in flight when (1) would break without it. The bound is about single groups; a count of
         outstanding work alone, the rule of most systems, lets a straggler exceed it.
requeue  Dispatch keeps (1), but the step does not wait: an attempt that can no longer meet its deadline is aborted and
         its prompt planned again. Long samples then finish less often than they begin.
mask     The step does not wait and nothing is aborted: a group may straddle any number of versions, and the loss
         leaves out its tokens that are older than T - K. Only a group without any fresh token leaves untrained.
"""

from collections import deque
from collections.abc import Collection, Mapping
from typing import Literal

from algorithms.slots import PacerState, Ready, ReadyGroups, Slot, Taken

WhenStale = Literal["pace", "mask", "requeue"]

Blocked = Literal["depth", "capacity", "bound", "done"]
"""Why no group may be dispatched: the pipeline is as deep as allowed, the replicas are full, one more group could not
meet its deadline, or enough groups are under way to finish the run."""

Waiting = Literal["groups", "oldest"]
"""Why no batch may be taken: too few groups are ready, or a group that must not be left behind is still in flight."""


class Pacer:
    """Every ordinal is in exactly one state; except in mask mode, inequality (1) holds after every call."""

    def __init__(
        self,
        *,
        groups_per_batch: int,
        max_staleness: int,
        num_batches: int,
        when_stale: WhenStale = "pace",
        over_sampling: float = 1.0,
        pipeline_depth: int | None = None,
        max_in_flight: int | None = None,
        version: int = 0,
    ) -> None:
        """Args:
        groups_per_batch: groups that one step trains on (B).
        max_staleness: the hard bound K, in weight versions.
        num_batches: steps of the run; no group is planned that no step would train.
        when_stale: what keeps the bound, see above.
        over_sampling: B counts this many times in (1) when a group is dispatched, because some will be filtered; those
            that nevertheless turn out too many are left out as surplus.
        pipeline_depth: most groups dispatched and not yet taken; None takes `default_depth`.
        max_in_flight: most groups that the replicas hold at once; None for no limit.
        version: the version of the policy at the start.
        """
        assert over_sampling >= 1.0, "fewer groups than are trained never fill a batch"
        self.groups_per_batch = groups_per_batch
        self.max_staleness = max_staleness
        self.when_stale = when_stale
        self._demand = int(groups_per_batch * over_sampling)
        self.deepest = self._demand * (max_staleness + 1)
        """The depth beyond which (1) would be the only limit."""
        self.pipeline_depth = pipeline_depth or default_depth(
            groups_per_batch=groups_per_batch,
            max_staleness=max_staleness,
            when_stale=when_stale,
            over_sampling=over_sampling,
        )
        self.max_in_flight = max_in_flight or self.pipeline_depth
        assert self.pipeline_depth >= groups_per_batch, "a pipeline shallower than a batch never fills it"
        self.next_version = version
        """T: the version at which the next batch taken will be trained."""
        self._batches_left = num_batches
        self._next_ordinal = 0
        self._planned: deque[Slot] = deque()  # lost attempts, to be sampled anew
        self._partial: deque[Slot] = deque()  # interrupted attempts, to be resumed
        self._in_flight: dict[int, Slot] = {}
        self._unfinished: dict[int, int] = {}  # date -> groups in flight or partial
        self._ready = ReadyGroups()
        self._too_late: list[Ready] = []  # finished without a fresh token; they leave at the next take

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_outstanding(self) -> int:
        """Groups dispatched and not yet taken."""
        return len(self._in_flight) + len(self._partial) + len(self._ready)

    @property
    def in_flight(self) -> Mapping[int, Slot]:
        """The groups under way, by ordinal."""
        return self._in_flight

    @property
    def exhausted(self) -> bool:
        """Whether the last batch has been taken."""
        return self._batches_left == 0

    @property
    def left_out_cause(self) -> str:
        return "stale" if self.when_stale == "mask" else "surplus"

    def blocked(self, version: int) -> Blocked | None:
        """Why no group may be dispatched to a replica that holds `version`; None when one may."""
        if self._partial:  # was counted when it began
            return "capacity" if len(self._in_flight) >= self.max_in_flight else None
        outstanding = self.num_outstanding
        if outstanding >= self._batches_left * self._demand:
            return "done"
        if outstanding >= self.pipeline_depth:
            return "depth"
        if len(self._in_flight) >= self.max_in_flight:
            return "capacity"
        if self.when_stale != "mask" and not self._one_more_fits(version):
            return "bound"
        return None

    def dispatch(self, version: int) -> Slot | None:
        """The next group for a replica that holds `version`; None when `blocked(version)` says why not.

        Interrupted groups come first, then failed ones, so that the oldest ordinal never waits behind new ones.
        """
        if self.blocked(version) is not None:
            return None
        if self._partial:
            old = self._partial.popleft()
            slot = Slot(old.ordinal, old.attempt + 1, old.version, resumed=True)
        else:
            if self._planned:
                old = self._planned.popleft()
                slot = Slot(old.ordinal, old.attempt + 1, version)
            else:
                slot = Slot(self._next_ordinal, 0, version)
                self._next_ordinal += 1
            self._unfinished[version] = self._unfinished.get(version, 0) + 1
        self._in_flight[slot.ordinal] = slot
        return slot

    def finished(self, slot: Slot, oldest_version: int, newest_version: int) -> bool:
        """The group is scored and may be trained; False when it is a late report of another attempt.

        `oldest_version` and `newest_version` are those among its sampled tokens; at least the slot's, because a
        replica's version only grows.
        """
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        if oldest_version < slot.version:
            raise ValueError(
                f"group {slot.ordinal} was dispatched at version {slot.version} and holds tokens of the older version "
                f"{oldest_version}: the replica serves weights that were never committed"
            )
        self._leave_flight(slot)
        self._hand_in(Ready(slot, oldest_version, newest_version))
        return True

    def failed(self, slot: Slot) -> bool:
        """The attempt is lost; its ordinal will be sampled anew. False for a late report of another attempt."""
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        self._leave_flight(slot)
        self._planned.append(slot)
        return True

    def interrupted(self, slot: Slot, oldest_version: int | None) -> bool:
        """The attempt stopped on its replica; it goes on elsewhere with its tokens, and keeps its deadline.

        `oldest_version` is the oldest among the tokens so far; None when there are none, and the group begins anew.
        """
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        self._leave_flight(slot)
        if oldest_version is None:
            self._planned.append(slot)
        else:
            assert oldest_version >= slot.version, "a replica's version only grows"
            self._partial.append(Slot(slot.ordinal, slot.attempt, oldest_version, slot.resumed))
            self._unfinished[oldest_version] = self._unfinished.get(oldest_version, 0) + 1
        return True

    def dropped(self, slot: Slot) -> bool:
        """The ordinal leaves the run untrained (filtered or quarantined); a new one takes its place in the batch."""
        if self._in_flight.get(slot.ordinal) != slot:
            return False
        self._leave_flight(slot)
        return True

    def waiting(self) -> Waiting | None:
        """Why no batch may be taken; None when one may."""
        if len(self._ready) < self.groups_per_batch:
            return "groups"
        return "oldest" if self.when_stale == "pace" and self._leaves_one_behind() else None

    def take(self) -> Taken | None:
        """The next batch, trained at `next_version`, and what must leave with it; None while `waiting()`."""
        if self.exhausted or self.waiting() is not None:
            return None
        batch = tuple(group.slot.ordinal for group in self._ready.pop_oldest(self.groups_per_batch))
        self.next_version += 1
        self._batches_left -= 1
        late = self._too_late + self._ready.pop_if(lambda group: not self._trainable(group))
        self._too_late = []
        slots = tuple(group.slot for group in late)
        if self.when_stale == "requeue":
            slots += self._abort_expired()
            self._planned.extend(slots)
            return Taken(batch, requeued=slots)
        return Taken(batch, left_out=tuple(slot.ordinal for slot in slots))

    def leftover(self) -> tuple[int, ...]:
        """Ordinals that were dispatched and that no step will train any more; once the run is exhausted."""
        assert self.exhausted, "until the last batch is taken every group may still be trained"
        scored = (group.slot for group in (*self._ready, *self._too_late))
        return tuple(sorted(slot.ordinal for slot in (*self._unfinished_slots(), *scored)))

    # Checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> PacerState:
        """A snapshot; `restore` continues from it."""
        return PacerState(
            self.next_version,
            self._batches_left,
            self._next_ordinal,
            unfinished=tuple(self._unfinished_slots()),
            ready=(*self._ready, *self._too_late),
        )

    def restore(self, state: PacerState, kept: Collection[int]) -> None:
        """Continue from a snapshot, in a new pacer; of the ready groups the tokens of the `kept` ordinals survived.

        Every other group is sampled anew under its ordinal.
        """
        assert self._next_ordinal == 0, "only a new pacer can continue a run"
        self.next_version, self._batches_left = state.next_version, state.batches_left
        self._next_ordinal = state.next_ordinal
        lost = [*state.unfinished]
        for group in state.ready:
            if group.slot.ordinal in kept:
                self._hand_in(group)
            else:
                lost.append(group.slot)
        self._planned.extend(sorted(lost, key=lambda slot: slot.ordinal))

    def _unfinished_slots(self) -> list[Slot]:
        """Planned again, in flight or interrupted."""
        return [*self._planned, *self._partial, *self._in_flight.values()]

    # The bound ---------------------------------------------------------------------------------------------------

    def _trainable(self, group: Ready) -> bool:
        """Whether the next batch may still train on the group: on all of it or, in mask mode, on its newest tokens."""
        counts = group.newest_version if self.when_stale == "mask" else group.oldest_version
        return counts + self.max_staleness >= self.next_version

    def _capacity(self, version: int, next_version: int) -> int:
        """Right-hand side of (1): groups that the steps up to the deadline of `version` train."""
        return self._demand * max(0, version + self.max_staleness - next_version + 1)

    def _one_more_fits(self, version: int) -> bool:
        """Whether (1) holds with one more group of `version`; for older versions it does not change."""
        due = self.num_outstanding + 1
        newer = {date for dates in (self._unfinished, self._ready.dates) for date in dates if date > version}
        for date in sorted(newer, reverse=True):
            if due > self._capacity(date, self.next_version):
                return False
            due -= self._unfinished.get(date, 0) + self._ready.count(date)
        return due <= self._capacity(version, self.next_version)

    def _leaves_one_behind(self) -> bool:
        """Whether (1) would break after a take for want of a group that is not finished yet."""
        to_take, due, unfinished = self.groups_per_batch, 0, 0
        for date in sorted({*self._unfinished, *self._ready.dates}):
            ready = self._ready.count(date)
            taken = min(to_take, ready)
            to_take -= taken
            unfinished += self._unfinished.get(date, 0)
            due += ready - taken + self._unfinished.get(date, 0)
            # Ready groups alone can be too many only after over-sampling; no waiting helps them.
            if unfinished and due > self._capacity(date, self.next_version + 1):
                return True
        return False

    def _abort_expired(self) -> tuple[Slot, ...]:
        """Unfinished attempts that cannot meet their deadline any more leave."""
        oldest = self.next_version - self.max_staleness
        if not any(date < oldest for date in self._unfinished):
            return ()
        in_flight = [slot for slot in self._in_flight.values() if slot.version < oldest]
        for slot in in_flight:
            self._leave_flight(slot)
        partial = [slot for slot in self._partial if slot.version < oldest]
        for slot in partial:
            self._partial.remove(slot)
            _subtract_one(self._unfinished, slot.version)
        return (*in_flight, *partial)

    def _hand_in(self, group: Ready) -> None:
        if self._trainable(group):
            self._ready.add(group)
        else:
            self._too_late.append(group)

    def _leave_flight(self, slot: Slot) -> None:
        del self._in_flight[slot.ordinal]
        _subtract_one(self._unfinished, slot.version)


def default_depth(*, groups_per_batch: int, max_staleness: int, when_stale: WhenStale, over_sampling: float) -> int:
    """Groups dispatched and not yet taken: B * (K + 1), all that the bound allows; in mask mode B * K, at least 2 B.

    In mask mode nothing but the depth keeps ready groups from waiting until their tokens are too old: with one batch
    less in the pipeline fewer tokens are masked, and the replicas are still busy (`python -m benchmarks.pacing`). With
    a single batch each step would wait for its slowest group.
    """
    num_batches = max(2, max_staleness) if when_stale == "mask" else max_staleness + 1
    return int(groups_per_batch * over_sampling) * num_batches


def _subtract_one(counts: dict[int, int], key: int) -> None:
    counts[key] -= 1
    if counts[key] == 0:
        del counts[key]
