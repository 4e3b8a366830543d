"""The admission rules of AReaL, TRL and verl, from their published formulas, behind the interface of our pacer.

Written in our own words; no code of theirs is here. Each rule decides when a group may be dispatched and which finished
groups make the next batch. They run in our simulator, on the same draws, slots and training time as our own pacer.

    AReaL   areal/infra/staleness_manager.py (`get_capacity`), areal/infra/workflow_executor.py (`wait_results`)
    TRL     trl/experimental/async_grpo (1.16.0): `RolloutQueueDataset`, `max_inflight_tasks`, `queue_maxsize`
    verl    verl/experimental/fully_async_policy: `set_max_required_samples`, `_should_pause_generation`,
            `reset_staleness`, and the message queue that pops its oldest entry when it is full

Assumptions, the same for all and in their favour where there was a choice:
- A unit of work is a whole group. TRL submits single completions; its limit is divided by the group size here.
- Versions count training batches: verl's `trigger_parameter_sync_step` and TRL's `weight_sync_steps` are 1, and a
  batch of verl's trainer (`ppo_mini_batch_size * require_batches`) is B groups.
- Weights are swapped under running requests, as all three can (verl with `partial_rollout`), at no cost, and the
  requests go on; so a token's staleness is measured against the weights that sampled it, not against the dispatch.
- Decisions are instant: none of their poll intervals (AReaL 50 ms, TRL 100 ms, verl 10 s) is charged.
- A batch is chosen at the moment it is trained: TRL's checks happen earlier, before collation and prefetching.
- No prompt is filtered. TRL does not issue a dropped prompt again: the next prompt of the stream takes its place.
"""

from collections import deque

from algorithms.pacing import Blocked, Waiting
from algorithms.slots import Ready, Slot, Taken


class Rival:
    """Finished groups wait in order of arrival; a batch is the first B of them. What may start is the rule of each."""

    left_out_cause = "stale"

    def __init__(self, *, groups_per_batch: int, num_batches: int, max_in_flight: int) -> None:
        self.groups_per_batch = groups_per_batch
        self.max_in_flight = max_in_flight
        self.next_version = 0
        self.max_staleness_seen = 0
        """Highest age of a group's oldest token when it was trained."""
        self._batches_left = num_batches
        self._next_ordinal = 0
        self._in_flight: dict[int, Slot] = {}
        self._ready: deque[Ready] = deque()
        self._dropped: list[int] = []  # finished groups that no step trains; they are told with the next batch

    def admits(self, version: int) -> bool:
        """Whether one more group may start while the replicas hold `version`."""
        raise NotImplementedError

    def blocked(self, version: int) -> Blocked | None:
        if self._batches_left == 0:
            return "done"
        if len(self._in_flight) >= self.max_in_flight:
            return "capacity"
        return None if self.admits(version) else "bound"

    def dispatch(self, version: int) -> Slot | None:
        if self.blocked(version) is not None:
            return None
        slot = Slot(self._next_ordinal, 0, version)
        self._next_ordinal += 1
        self._in_flight[slot.ordinal] = slot
        return slot

    def finished(self, slot: Slot, oldest_version: int, newest_version: int) -> bool:
        del self._in_flight[slot.ordinal]
        self._ready.append(Ready(slot, oldest_version, newest_version))
        return True

    def failed(self, slot: Slot) -> bool:
        """The next prompt takes its place."""
        del self._in_flight[slot.ordinal]
        return True

    dropped = failed

    def waiting(self) -> Waiting | None:
        return "groups" if len(self._ready) < self.groups_per_batch else None

    def take(self) -> Taken | None:
        if self._batches_left == 0 or self.waiting() is not None:
            return None
        batch = [self._ready.popleft() for _ in range(self.groups_per_batch)]
        stalest = max(self.next_version - group.oldest_version for group in batch)
        self.max_staleness_seen = max(self.max_staleness_seen, stalest)
        self.next_version += 1
        self._batches_left -= 1
        dropped, self._dropped = tuple(self._dropped), []
        return Taken(tuple(group.slot.ordinal for group in batch), left_out=dropped)

    def leftover(self) -> tuple[int, ...]:
        """Ordinals without a fate at the end of the run."""
        return (*self._in_flight, *(group.slot.ordinal for group in self._ready), *self._dropped)


class Areal(Rival):
    """The groups ever accepted or running stay within (eta + version + 1) B; batches are taken in order of dispatch.

    `eta` is `max_head_offpolicyness`. It counts work, and so bounds the age of no single group. The default limit of
    concurrent rollouts is the batch.
    """

    def __init__(self, eta: int, *, groups_per_batch: int, num_batches: int, max_in_flight: int | None = None) -> None:
        limit = max_in_flight or groups_per_batch
        super().__init__(groups_per_batch=groups_per_batch, num_batches=num_batches, max_in_flight=limit)
        self._eta = eta
        self._num_accepted = 0

    def admits(self, version: int) -> bool:
        return self._num_accepted + len(self._in_flight) < (self._eta + version + 1) * self.groups_per_batch

    def finished(self, slot: Slot, oldest_version: int, newest_version: int) -> bool:
        self._num_accepted += 1
        return super().finished(slot, oldest_version, newest_version)

    def take(self) -> Taken | None:
        if self.waiting() is None:
            self._ready = deque(sorted(self._ready, key=lambda group: group.slot.ordinal))
        return super().take()


class Trl(Rival):
    """A finished group is dropped when the version is more than `max_staleness` past the one at its submission.

    At most max(1, max_staleness) B groups are generated at once, and the queue of finished ones holds `queue_maxsize`
    completions, after which generation stands still.
    """

    def __init__(
        self,
        max_staleness: int,
        *,
        groups_per_batch: int,
        num_batches: int,
        max_in_flight: int | None = None,
        num_generations: int = 8,
        queue_maxsize: int = 1024,
    ) -> None:
        limit = max_in_flight or max(1, max_staleness) * groups_per_batch
        super().__init__(groups_per_batch=groups_per_batch, num_batches=num_batches, max_in_flight=limit)
        self._max_staleness = max_staleness
        self._queue_groups = queue_maxsize // num_generations

    def admits(self, version: int) -> bool:
        return len(self._ready) < self._queue_groups

    def take(self) -> Taken | None:
        self._drop_stale()
        return super().take()

    def _drop_stale(self) -> None:
        """The reader of the queue pops until it has a batch; while it waits the version stands still."""
        fresh: list[Ready] = []
        while self._ready and len(fresh) < self.groups_per_batch:
            group = self._ready.popleft()
            if self.next_version - group.slot.version > self._max_staleness:
                self._dropped.append(group.slot.ordinal)
            else:
                fresh.append(group)
        self._ready.extendleft(reversed(fresh))


class Verl(Rival):
    """Between two synchronisations no more groups start than bring the count to int((theta + 1) B).

    `theta` is `staleness_threshold`, a share of samples, not of versions. The count goes up with every dispatch and not
    down with a finish; a synchronisation sets it to the groups in flight and in the queue. The default limit of
    concurrent groups is 16 for each replica.
    """

    def __init__(
        self,
        theta: float,
        *,
        groups_per_batch: int,
        num_batches: int,
        max_in_flight: int | None = None,
        num_replicas: int = 1,
    ) -> None:
        self._max_required = int(groups_per_batch * (theta + 1))
        limit = min(max_in_flight or 16 * num_replicas, self._max_required)
        super().__init__(groups_per_batch=groups_per_batch, num_batches=num_batches, max_in_flight=limit)
        self._count = 0
        self._synced_version = 0

    def admits(self, version: int) -> bool:
        self._synchronise(version)
        return len(self._ready) < self._max_required and self._count < self._max_required

    def dispatch(self, version: int) -> Slot | None:
        slot = super().dispatch(version)
        self._count += slot is not None
        return slot

    def take(self) -> Taken | None:
        self._synchronise(self.next_version)  # the count is set before the next batch leaves the queue
        return super().take()

    def finished(self, slot: Slot, oldest_version: int, newest_version: int) -> bool:
        if len(self._ready) >= self._max_required:
            self._dropped.append(self._ready.popleft().slot.ordinal)
        return super().finished(slot, oldest_version, newest_version)

    def _synchronise(self, version: int) -> None:
        if version > self._synced_version:
            self._synced_version = version
            self._count = len(self._in_flight) + len(self._ready)
