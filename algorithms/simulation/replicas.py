"""Decoding as processor sharing: all running sequences of a replica are at the same attained service, whatever runs.

An iteration of a replica with c running sequences takes base_s + per_sequence_s * c seconds and gives each one token.
So the replica keeps one clock, its level: tokens that a sequence would have which had run from the start. A sequence of
n tokens that starts at level s finishes at level s + n, and only the first of these levels needs a place in time, anew
whenever the number of running sequences changes. An event costs O(log) of the replicas and of the slots.

At most `max_num_seqs` sequences run on a replica; others queue, first come, first served. `now` is generation time
throughout: it stands still while an in-flight update pauses all replicas.
"""

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from math import floor, inf

from algorithms.slots import Slot

_SAME_LEVEL = 1e-9
"""Levels closer than this (tokens) are one: they differ by rounding."""

# (level at which it finishes, serial number, group, length, start, version at the start); a tuple because heapq then
# compares in C, and because nothing else is made for a sequence.
Running = tuple[float, int, "Group", int, float, int]


class Group:
    """One attempt at a prompt: what was sampled for it so far, by weight version."""

    __slots__ = ("expected_tokens", "lengths", "num_unfinished", "replica", "seconds", "slot", "tokens")

    def __init__(self, slot: Slot, lengths: list[int], replica: int, expected_tokens: int = 0) -> None:
        self.slot = slot
        self.expected_tokens = expected_tokens
        """What the router was told."""
        self.lengths = lengths
        self.replica = replica
        self.num_unfinished = len(lengths)
        self.tokens: dict[int, int] = {}
        """Version -> tokens sampled by it, of sequences that are no longer running."""
        self.seconds: dict[int, float] = {}
        """Version -> seconds of slots occupied while it was served, of the same sequences."""

    def add(self, version: int, tokens: int, seconds: float) -> None:
        if tokens:
            self.tokens[version] = self.tokens.get(version, 0) + tokens
        self.seconds[version] = self.seconds.get(version, 0.0) + seconds


class Replica:
    """One inference engine."""

    __slots__ = ("at", "due", "groups", "holding", "level", "queue", "running", "swap_levels", "version")

    def __init__(self) -> None:
        self.version = 0
        self.level = 0.0
        self.at = 0.0
        """When `level` was true."""
        self.due = inf
        """When the next sequence finishes."""
        self.running: list[Running] = []
        self.queue: deque[tuple[Group, int]] = deque()
        self.groups: dict[int, Group] = {}
        """By ordinal: all that the replica answers for, those in scoring too."""
        self.swap_levels = [0.0]
        """Version -> level at which it was swapped in."""
        self.holding = False
        """No queued sequence may start: the replica drains for a swap."""


class Fleet:
    """All replicas; what they do is told by `finish_due`, in the order of time."""

    def __init__(self, num_replicas: int, max_num_seqs: int, base_s: float, per_sequence_s: float) -> None:
        self._replicas = [Replica() for _ in range(num_replicas)]
        self._dead: set[int] = set()
        self.num_alive = num_replicas
        self._max_num_seqs = max_num_seqs
        self._iteration_s = [base_s + per_sequence_s * running for running in range(max_num_seqs + 1)]
        self._dues: list[tuple[float, int]] = []  # lazily: an entry counts only while it states the replica's due
        self._serial = 0
        self._swap_times = [0.0]  # version -> when all replicas swapped to it together
        self.num_running = 0
        """Sequences running on all replicas."""
        self.num_holding = 0
        """Replicas that drain, or are empty, for a swap."""
        self.num_held = 0
        """Free slots of replicas that are holding."""
        self.drained: list[int] = []
        """Replicas that have become empty while holding; whoever reads them clears the list."""

    def alive(self) -> list[int]:
        return [index for index in range(len(self._replicas)) if index not in self._dead]

    def next_due(self) -> float:
        """When the next sequence finishes; infinity when none runs."""
        dues, replicas = self._dues, self._replicas
        while dues:
            due, index = dues[0]
            if replicas[index].due == due:
                return due
            heappop(dues)
        return inf

    # Groups ------------------------------------------------------------------------------------------------------

    def start(self, group: Group, now: float) -> None:
        """Queue the group's sequences on its replica; they run as soon as there are slots."""
        replica = self._replicas[group.replica]
        replica.groups[group.slot.ordinal] = group
        queue = replica.queue
        for length in group.lengths:
            queue.append((group, length))
        if not replica.holding and len(replica.running) < self._max_num_seqs:
            self._advance(replica, now)
            self._fill(replica)
            self._schedule(group.replica)

    def finish_due(self) -> list[Group]:
        """Finish the sequences of one replica that are due at `next_due()`; the groups that are complete with that."""
        due, index = self._dues[0]
        replica = self._replicas[index]
        running, version = replica.running, replica.version
        replica.at, replica.level = due, running[0][0]
        until = replica.level + _SAME_LEVEL
        before, complete = len(running), []
        while running and running[0][0] <= until:
            finish, _, group, length, started, first_version = heappop(running)
            if first_version == version:
                group.tokens[version] = group.tokens.get(version, 0) + length
                group.seconds[version] = group.seconds.get(version, 0.0) + due - started
            else:
                self._spread(replica, group, length, finish - length, started, first_version)
            group.num_unfinished -= 1
            if not group.num_unfinished:
                complete.append(group)
        self._stopped(index, before - len(running))
        if running:
            replica.due = replica.at + (running[0][0] - replica.level) * self._iteration_s[len(running)]
            heapreplace(self._dues, (replica.due, index))
        else:
            heappop(self._dues)
            replica.due = inf
        return complete

    def leave(self, group: Group) -> None:
        """The group is scored: its replica no longer answers for it."""
        del self._replicas[group.replica].groups[group.slot.ordinal]

    def stop(self, group: Group, now: float) -> bool:
        """Stop what is left of the group; False when its replica no longer answers for it.

        Its `tokens` and `seconds` then hold all that it has cost.
        """
        replica = self._replicas[group.replica]
        if replica.groups.get(group.slot.ordinal) is not group:
            return False
        del replica.groups[group.slot.ordinal]
        if group.num_unfinished:
            self._advance(replica, now)
            replica.queue = deque(entry for entry in replica.queue if entry[0] is not group)
            stopped = [entry for entry in replica.running if entry[2] is group]
            replica.running = [entry for entry in replica.running if entry[2] is not group]
            heapify(replica.running)
            self._cut(replica, stopped)
            self._stopped(group.replica, len(stopped))
            self._schedule(group.replica)
        return True

    # Weight versions ---------------------------------------------------------------------------------------------

    def swap_all(self, now: float) -> None:
        """All replicas serve the next version from now on; running sequences go on under it."""
        self._swap_times.append(now)
        for replica in self._replicas:
            self._advance(replica, now)
            replica.swap_levels.append(replica.level)
            replica.version += 1

    def hold(self, index: int) -> None:
        """Let the replica's running sequences finish, and start no others before its swap."""
        replica = self._replicas[index]
        replica.holding = True
        self.num_holding += 1
        self.num_held += self._max_num_seqs - len(replica.running)
        if not replica.running:
            self.drained.append(index)

    def holds(self, index: int, version: int) -> bool:
        """Whether the replica still waits to swap from `version`; it may have died meanwhile."""
        return self._replicas[index].holding and self._replicas[index].version == version

    def swap(self, index: int, now: float) -> None:
        """The replica, which is empty, serves the next version and starts what is queued."""
        replica = self._replicas[index]
        assert not replica.running, "without in-flight updates a replica swaps when it is empty"
        replica.holding = False
        self.num_holding -= 1
        self.num_held -= self._max_num_seqs
        replica.version += 1
        self._advance(replica, now)
        self._fill(replica)
        self._schedule(index)

    # Failures ----------------------------------------------------------------------------------------------------

    def fail(self, index: int, now: float) -> list[Group]:
        """The replica dies; all groups that it answered for."""
        replica = self._replicas[index]
        self._advance(replica, now)
        self._cut(replica, replica.running)
        self.num_running -= len(replica.running)
        if replica.holding:
            replica.holding = False
            self.num_holding -= 1
            self.num_held -= self._max_num_seqs - len(replica.running)
        groups = list(replica.groups.values())
        replica.running.clear()
        replica.queue.clear()
        replica.groups.clear()
        replica.due = inf
        self._dead.add(index)
        self.num_alive -= 1
        return groups

    def recover(self, index: int, version: int, now: float) -> None:
        """The replica serves again, at `version`."""
        self._dead.remove(index)
        self.num_alive += 1
        replica = self._replicas[index]
        self._advance(replica, now)
        replica.version = version

    # Inside ------------------------------------------------------------------------------------------------------

    def _advance(self, replica: Replica, now: float) -> None:
        """Bring the level up to date."""
        if now > replica.at:
            if replica.running:
                replica.level += (now - replica.at) / self._iteration_s[len(replica.running)]
            replica.at = now

    def _fill(self, replica: Replica) -> None:
        """Start queued sequences in the free slots; the level is up to date."""
        running, queue = replica.running, replica.queue
        started = min(self._max_num_seqs - len(running), len(queue))
        level, at, version, serial = replica.level, replica.at, replica.version, self._serial
        for _ in range(started):
            group, length = queue.popleft()
            serial += 1
            heappush(running, (level + length, serial, group, length, at, version))
        self._serial = serial
        self.num_running += started

    def _stopped(self, index: int, num_stopped: int) -> None:
        """So many sequences have left the replica; others take their slots. The schedule is the caller's to mend."""
        replica = self._replicas[index]
        self.num_running -= num_stopped
        if replica.holding:
            self.num_held += num_stopped
            if num_stopped and not replica.running:
                self.drained.append(index)
        elif replica.queue:
            self._fill(replica)

    def _schedule(self, index: int) -> None:
        """Put the replica's next finish in its place in time; the level is up to date."""
        replica = self._replicas[index]
        running = replica.running
        if not running:
            replica.due = inf
            return
        due = replica.at + (running[0][0] - replica.level) * self._iteration_s[len(running)]
        if due != replica.due:
            replica.due = due
            heappush(self._dues, (due, index))

    def _cut(self, replica: Replica, stopped: list[Running]) -> None:
        """Book what sequences have cost that stop before their end."""
        for finish, _, group, length, started, first_version in stopped:
            done = min(length, floor(replica.level - (finish - length) + _SAME_LEVEL))
            self._spread(replica, group, done, finish - length, started, first_version)

    def _spread(
        self, replica: Replica, group: Group, length: int, start_level: float, started: float, first_version: int
    ) -> None:
        """Book a sequence under the versions that sampled it: a token is of the version at which it is complete."""
        done, since = 0, started
        for version in range(first_version, replica.version):
            swapped = self._swap_times[version + 1]
            tokens = min(length, max(done, floor(replica.swap_levels[version + 1] - start_level + _SAME_LEVEL)))
            group.add(version, tokens - done, swapped - since)
            done, since = tokens, swapped
        group.add(replica.version, length - done, replica.at - since)
