"""A group goes, whole, to the replica with the fewest outstanding tokens, and no replica holds more than its limit.

Pure: replicas are numbers. A group's tokens are an estimate that the caller makes once and hands back with `done`.
"""

from collections.abc import Collection
from heapq import heapify, heappop, heappush


class Router:
    """Every group that was assigned counts for its replica until it is done; ties go to the lower number."""

    def __init__(self, max_groups_per_replica: int | None = None) -> None:
        """`max_groups_per_replica`: most groups that one replica holds, decoding or queued; None for no limit."""
        self._limit = max_groups_per_replica
        self._tokens: dict[int, int] = {}
        self._groups: dict[int, int] = {}
        # (tokens, replica), lazily: an entry counts only while it states what the replica has and the replica has room.
        self._heap: list[tuple[int, int]] = []

    @property
    def replicas(self) -> tuple[int, ...]:
        """The replicas that groups may go to."""
        return tuple(self._tokens)

    def join(self, replica: int) -> None:
        """Groups may go to this replica from now on; one that left comes back under another number, or when
        nothing that it was given is outstanding."""
        assert replica not in self._tokens, f"replica {replica} is here already"
        self._tokens[replica] = self._groups[replica] = 0
        self._offer(replica)

    def leave(self, replica: int) -> None:
        """No further group goes to this replica; `done` of its groups may still come."""
        del self._tokens[replica], self._groups[replica]

    def assign(self, num_tokens: int, avoid: Collection[int] = ()) -> int | None:
        """The replica for a group of about `num_tokens` tokens; None when every replica is full.

        It is none of `avoid`, full or not the others, unless there are no others.
        """
        avoid = {replica for replica in avoid if replica in self._tokens}
        if len(avoid) == len(self._tokens):
            avoid = set()
        avoided: set[int] = set()
        found = None
        while self._heap and found is None:
            tokens, replica = heappop(self._heap)
            if self._tokens.get(replica) != tokens or not self._has_room(replica):
                continue
            if replica in avoid:
                avoided.add(replica)
            else:
                found = replica
        for replica in avoided:
            self._offer(replica)
        if found is not None:
            self._tokens[found] += num_tokens
            self._groups[found] += 1
            self._offer(found)
        return found

    def done(self, replica: int, num_tokens: int) -> None:
        """A group has left the replica, finished or not; `num_tokens` as they were assigned."""
        if replica not in self._tokens:
            return
        self._tokens[replica] -= num_tokens
        self._groups[replica] -= 1
        self._offer(replica)

    def _has_room(self, replica: int) -> bool:
        return self._limit is None or self._groups[replica] < self._limit

    def _offer(self, replica: int) -> None:
        if not self._has_room(replica):
            return
        heappush(self._heap, (self._tokens[replica], replica))
        if len(self._heap) > 64 + 8 * len(self._tokens):  # outdated entries must not pile up
            self._heap = [(tokens, index) for index, tokens in self._tokens.items() if self._has_room(index)]
            heapify(self._heap)
