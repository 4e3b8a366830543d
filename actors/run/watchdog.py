"""A run that stalls ends, or goes on, with one sentence that names the suspect, and leaves stall.txt.

Everything that can be known is asked for at that moment: what can be seen of the workers (sight.py), which groups are
on their way and since when, and what the schedule and the publication wait for.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError

from actors.errors import RunError, last_line
from actors.fleet import Fleet
from actors.pacer import AsyncPacer
from actors.publisher import Publisher
from actors.router import Router
from actors.run.sight import Member, Sight, StallError, look, suspected
from actors.run.suspect import CRITIC, POLICY, REFERENCE, REPLICA, REWARD, Pending, Worker, suspect


@dataclass(slots=True)
class Watchdog:
    """Looks at the workers when it is told that a run stalls."""

    policies: tuple[Any, ...]
    references: tuple[Any, ...]
    rewards: tuple[Any, ...]
    fleet: Fleet
    router: Router
    pacer: AsyncPacer
    publisher: Publisher
    path: Path
    """Where what was seen is written."""
    then: Literal["exit", "retry"]
    say: Callable[[str], None]
    leave: Callable[[int], Awaitable[int | None]] | None = None
    """Takes a last checkpoint at a version; of which the newest is then, if there is any."""
    critics: tuple[Any, ...] = ()
    starting: Callable[[], str] = str
    """The workers that are being started and without which no group gets on; empty when there are none."""
    restarting: Callable[[], Collection[str]] = tuple
    """Reward and reference workers that are being started again, by role and number; others may serve meanwhile."""

    async def idle(self, reason: str) -> RunError | None:
        """No group finishes while the policy waits: what ends the run, or None when the suspect is replaced.

        None, too, while it waits for workers that are being started: that has deadlines of its own, and a scorer that
        is being started again is no excuse for others. And when a group has finished, or the run was asked to stop,
        before all was looked at.
        """
        if starting := self.starting():
            self.say(f"warning: {reason}: {starting}, and it waits for that")
            return None
        before = self.pacer.progress_at
        sight = await self._look(reason)
        what = sight.sentence(reason)
        if self.pacer.progress_at != before:
            self.say(f"warning: {what}; something has changed meanwhile, and it waits on, see {self.path}")
            return None
        found = suspect(sight.workers, sight.pending)
        if found is not None and found[0].name in self.restarting():
            self.say(f"warning: {what}; it is being started again, and the run waits for that")
            return None
        learns = found is not None and found[0].role in (POLICY, CRITIC)
        if self.then == "retry" and found is not None and not learns:
            self.say(f"warning: {what}; it is replaced, see {self.path}")
            self._replace(*found)
            return None
        left = "" if learns else await self._checkpoint()
        return StallError(f"{what}; {left}see {self.path}")

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """A deadline of the policy or of a publication that passes inside is told with its suspect."""
        async with suspected(self._look, self.path):
            yield

    def _replace(self, worker: Worker, why: str) -> None:
        """Another takes its place: the fleet counts replicas, and Ray the restarts of scorers, up to their limits."""
        if worker.role == REPLICA:
            self.fleet.fence(worker.number, f"the run stalled: it {why}")
        else:
            handles = self.references if worker.role == REFERENCE else self.rewards
            ray.kill(handles[worker.number], no_restart=False)

    async def _checkpoint(self) -> str:
        version = self.publisher.committed
        if self.leave is None or version is None:
            return ""
        try:
            newest = await self.leave(version)
        except (RunError, RayError) as error:
            return f"no checkpoint could be left ({last_line(error)}); "
        return "" if newest is None else f"the same command goes on from step {newest}; "

    async def _look(self, reason: str) -> Sight:
        now = time.monotonic()
        pending = [
            Pending(ordinal, attempt, sent.replica, now - sent.since)
            for (ordinal, attempt), sent in self.router.sent.items()
        ]
        facts = self.pacer.facts() | {"the committed version is": str(self.publisher.committed)}
        return await look(list(self._members()), pending, reason, facts, self.path, self.say)

    def _members(self) -> Iterator[Member]:
        learners = ((POLICY, self.policies), (CRITIC, self.critics))
        for role, handles in (*learners, (REFERENCE, self.references), (REWARD, self.rewards)):
            yield from (Member(role, number, handle) for number, handle in enumerate(handles))
        yield from (Member(REPLICA, replica.number, replica.handle) for replica in self.fleet.members)
