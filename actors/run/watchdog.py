"""A run that stalls ends, or goes on, with one sentence that names the suspect, and leaves stall.txt.

Everything that can be known is asked for at that moment, each question with a deadline: who is alive (Ray), who
answers, what every process of the run's actors does (its state and Python stack, from a task on its node), which groups
are on their way and since when, and what the schedule and the publication wait for.
"""

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.deadline import DeadlineError, aside, within
from actors.errors import PolicyLostError, RunError, first_cause, last_line
from actors.fleet import Fleet
from actors.pacer import AsyncPacer
from actors.publisher import Publisher
from actors.router import Router
from actors.run.stacks import processes_of
from actors.run.suspect import POLICY, REFERENCE, REPLICA, REWARD, Pending, Worker, report, sentence, suspect

_ASK_TIMEOUT_S = 3.0
_LOOK_TIMEOUT_S = 20.0
_TASK_TIMEOUT_S = 60.0
"""For a node to start a process that looks around there, and for that to look."""


class StallError(RunError):
    """The run does not get on; the message names the suspect."""


@dataclass(frozen=True, slots=True)
class _Member:
    role: str
    number: int
    handle: Any


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

    async def idle(self, reason: str) -> RunError | None:
        """No group finishes while the policy waits: what ends the run, or None when the suspect is replaced."""
        workers, pending = await self._look(reason)
        what = sentence(workers, pending, reason)
        found = suspect(workers, pending)
        if self.then == "retry" and found is not None and found[0].role != POLICY:
            self.say(f"warning: {what}; it is replaced, see {self.path}")
            self._replace(*found)
            return None
        left = "" if found is not None and found[0].role == POLICY else await self._checkpoint()
        return StallError(f"{what}; {left}see {self.path}")

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """A deadline of the policy or of a publication that passes inside is told with its suspect."""
        try:
            yield
        except (DeadlineError, PolicyLostError, BaseExceptionGroup) as error:
            cause = first_cause(error)
            lost = isinstance(cause, PolicyLostError)  # the run goes on with another policy
            if not isinstance(cause.__cause__ if lost else cause, DeadlineError):
                raise
            reason = str(cause)
            workers, pending = await self._look(reason)
            told = f"{sentence(workers, pending, reason)}; see {self.path}"
            raise (PolicyLostError if lost else StallError)(told) from error

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

    async def _look(self, reason: str) -> tuple[list[Worker], list[Pending]]:
        now = time.monotonic()
        pending = [
            Pending(ordinal, attempt, sent.replica, now - sent.since)
            for (ordinal, attempt), sent in self.router.sent.items()
        ]
        members = list(self._members())
        workers = await _seen(members)
        facts = self.pacer.facts() | {"the committed version is": str(self.publisher.committed)}
        try:
            self.path.write_text(report(reason, workers, pending, facts), encoding="utf-8")
        except OSError as error:  # a disk that is full may be why it stalls
            self.say(f"warning: {self.path} could not be written: {error}")
        return workers, pending

    def _members(self) -> Iterator[_Member]:
        for role, handles in ((POLICY, self.policies), (REFERENCE, self.references), (REWARD, self.rewards)):
            yield from (_Member(role, number, handle) for number, handle in enumerate(handles))
        yield from (_Member(REPLICA, replica.number, replica.handle) for replica in self.fleet.members)


async def _seen(members: list[_Member]) -> list[Worker]:
    """All that can be known of the members, at about the same time."""
    asking = (_answers(member) for member in members)
    rays, answers = await asyncio.gather(_known_to_ray(members), asyncio.gather(*asking))
    pids: dict[str, list[int]] = {}
    for known in rays:
        if known is not None and known["State"] == "ALIVE":
            pids.setdefault(known["Address"]["NodeID"], []).append(known["Pid"])
    looks = dict(zip(pids, await asyncio.gather(*(_look_at(node, of) for node, of in pids.items())), strict=True))
    workers = []
    for member, known, answer in zip(members, rays, answers, strict=True):
        if known is None:
            note = "Ray did not say where it is"
            workers.append(Worker(member.role, member.number, "", True, answer is not None, (), note, answer or ""))
            continue
        look = looks.get(known["Address"]["NodeID"], {})
        processes = () if isinstance(look, str) else look.get(known["Pid"], ())
        note = look if isinstance(look, str) else ""
        node, alive = known["Address"]["IPAddress"], known["State"] != "DEAD"
        told = answer is not None, processes, note, answer or ""
        workers.append(Worker(member.role, member.number, node, alive, *told))
    return workers


async def _known_to_ray(members: list[_Member]) -> list[dict[str, Any] | None]:
    """What Ray's head knows of each actor; it knows where a process is that cannot say so itself."""
    from ray._private import state  # the public state API asks the dashboard, which a local Ray does not have

    def ask() -> list[dict[str, Any] | None]:
        return [state.actors(member.handle._actor_id.hex()) or None for member in members]

    try:
        return await within(_ASK_TIMEOUT_S, aside(ask), "asking Ray for its actors")
    except (RunError, RayError):
        return [None] * len(members)


async def _answers(member: _Member) -> str | None:
    """What the actor does by its own account; None when it does not answer."""
    try:
        account: str = await within(_ASK_TIMEOUT_S, member.handle.__ray_call__.remote(_account), "an answer")
    except (RunError, RayError):
        return None
    return account


async def _look_at(node: str, pids: list[int]) -> dict[int, Any] | str:
    """The processes behind each pid of a node, or why they could not be looked at."""
    affinity = NodeAffinitySchedulingStrategy(node, soft=False)
    look: Any = ray.remote(processes_of)
    try:
        seen: dict[int, Any] = await within(
            _TASK_TIMEOUT_S,
            look.options(num_cpus=0, scheduling_strategy=affinity, max_retries=0).remote(pids, _LOOK_TIMEOUT_S),
            f"looking at the processes of node {node[:8]}",
        )
    except (RunError, RayError) as error:
        return f"no stacks: {last_line(error)}"
    return seen


def _account(_: object) -> str:
    """The Python stacks of this process, for where py-spy may not look (containers without SYS_PTRACE)."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = [(names.get(ident, "?"), traceback.format_stack(frame)) for ident, frame in sys._current_frames().items()]
    return "\n".join(f"Thread {name}\n{''.join(stack)}" for name, stack in stacks).rstrip()
