"""A group goes, whole, to one replica, and comes back from it once: scored, or interrupted.

Which replica is decided in algorithms/routing.py by outstanding tokens; here groups are sent and called back.
"""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray

from algorithms.routing import Router as Routes
from algorithms.slots import Slot
from algorithms.types import GroupSummary, Prompt


@dataclass(frozen=True, slots=True)
class Sent:
    """One attempt on its replica."""

    replica: int
    num_tokens: int
    """The estimate it counts for while it is there."""
    answer: ray.ObjectRef
    """A GroupSummary, or Interrupted."""
    group: ray.ObjectRef
    """The scored group, or the part of it that was sampled."""
    since: float = field(default_factory=time.monotonic)

    def forsake(self) -> None:
        """Nobody asks for the group any more, because its attempt has failed or is not waited for.

        Ray prints every error that nobody has asked for. The answer brings the same one, and whoever makes the attempt
        tells of it.
        """
        group = self.group

        def arrived(answer: Future[Any]) -> None:
            if answer.exception(0.0) is not None:  # it is there
                group.future()

        self.answer.future().add_done_callback(arrived)


class Router:
    """Groups go to replicas that have room, and `done` is called once for each."""

    def __init__(
        self,
        *,
        max_groups_per_replica: int,
        num_generations: int,
        max_completion_length: int,
    ) -> None:
        self._replicas: dict[int, ray.actor.ActorHandle] = {}
        self._routes = Routes(max_groups_per_replica)
        self._num_generations = num_generations
        self._length = float(max_completion_length)  # running mean of a completion's tokens
        self._sent: dict[tuple[int, int], Sent] = {}
        self._shunned: Counter[int] = Counter()  # by how many
        self._freed = asyncio.Event()

    @property
    def sent(self) -> dict[tuple[int, int], Sent]:
        """Every attempt that is with a replica, by ordinal and attempt."""
        return dict(self._sent)

    def join(self, replica: int, handle: ray.actor.ActorHandle) -> None:
        """Groups may go to this replica from now on."""
        self._replicas[replica] = handle
        self._routes.join(replica)
        self._freed.set()

    def leave(self, replica: int) -> None:
        """No further group goes there; those that it holds end there."""
        self._routes.leave(replica)
        del self._replicas[replica]
        self._freed.set()  # who avoids another, and waits for this one, has no choice any more

    @contextlib.contextmanager
    def shunned(self, replica: int) -> Iterator[None]:
        """No group goes to the replica while any other serves."""
        self._shunned[replica] += 1
        try:
            yield
        finally:
            self._shunned -= Counter((replica,))
            self._freed.set()

    def is_shunned(self, replica: int) -> bool:
        return self._shunned[replica] > 0

    async def dispatch(
        self, prompt: Prompt, slot: Slot, partial: ray.ObjectRef | None, avoid: Collection[int] = ()
    ) -> Sent:
        """Send the group to the replica with the fewest outstanding tokens; waits while all are full.

        `partial` is what an interrupted attempt has sampled already; to none of `avoid` it goes while another serves.
        """
        num_tokens = len(prompt.token_ids) + round(self._num_generations * self._length)
        while (replica := self._routes.assign(num_tokens, {*self._shunned, *avoid})) is None:
            self._freed.clear()
            await self._freed.wait()
        references: tuple[ray.ObjectRef, ray.ObjectRef]
        references = self._replicas[replica].fill.remote(prompt, slot.attempt, partial)
        sent = self._sent[slot.ordinal, slot.attempt] = Sent(replica, num_tokens, *references)
        return sent

    def done(self, slot: Slot) -> None:
        """The group has left its replica, finished or not."""
        sent = self._sent.pop((slot.ordinal, slot.attempt), None)
        if sent is not None:
            self._routes.done(sent.replica, sent.num_tokens)
            self._freed.set()

    def learned(self, summary: GroupSummary) -> None:
        """Lengths drift in training; the estimate follows them."""
        mean = sum(summary.num_loss_tokens_G) / len(summary.num_loss_tokens_G)
        self._length += 0.05 * (mean - self._length)

    def interrupt(self, slots: Iterable[Slot]) -> None:
        """Ask the replicas to stop these attempts; each answers its own call, with a deadline, so nobody waits here."""
        by_replica: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for slot in slots:
            sent = self._sent.get((slot.ordinal, slot.attempt))
            if sent is not None:
                by_replica[sent.replica].append((slot.ordinal, slot.attempt))
        for replica, attempts in by_replica.items():
            if replica in self._replicas:
                _heard(self._replicas[replica].interrupt.remote(attempts))

    def serves_besides(self, replicas: Set[int]) -> bool:
        """Whether groups may go to any other replica."""
        return bool(self._replicas.keys() - replicas)

    async def emptied(self, replica: int) -> None:
        """Until the replica holds no group any more; the caller sets the deadline."""
        while any(sent.replica == replica for sent in self._sent.values()):
            self._freed.clear()
            await self._freed.wait()


def _heard(call: ray.ObjectRef) -> None:
    """Nobody waits for the call; that it failed is told by the groups that it was about, and not by Ray as well."""
    call.future()
