"""What can be seen of workers at one moment, each question with a deadline: who looks never hangs with them.

Who is alive (Ray), who answers, and what every process behind it does (its state and Python stack, from a task on its
node).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.deadline import DeadlineError, aside, within
from actors.errors import PolicyLostError, RunError, first_cause, last_line
from actors.run.stacks import processes_of, stacks_here, tasks_here
from actors.run.suspect import Pending, Worker, report, sentence

_ASK_TIMEOUT_S = 3.0
_LOOK_TIMEOUT_S = 20.0
_TASK_TIMEOUT_S = 60.0
"""For a node to start a process that looks around there, and for that to look."""


class StallError(RunError):
    """The run does not get on; the message names the suspect."""


@dataclass(frozen=True, slots=True)
class Member:
    """A worker of the run, and how it is reached."""

    role: str
    number: int
    handle: Any


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen, and what waits."""

    workers: Sequence[Worker]
    pending: Sequence[Pending]

    def sentence(self, reason: str) -> str:
        return sentence(self.workers, self.pending, reason)


async def look(
    members: Sequence[Member],
    pending: Sequence[Pending],
    reason: str,
    facts: Mapping[str, str],
    path: Path,
    say: Callable[[str], None],
) -> Sight:
    """All of it, which is in `path` when this returns."""
    workers: list[Worker] = []
    facts = dict(facts)
    try:
        workers = await seen(members)
    except Exception as error:  # noqa: BLE001  whatever is wrong with looking, that the run stalls is told
        facts["the workers could not be looked at"] = f"{type(error).__name__}: {last_line(error)}"
        say(f"warning: the workers could not be looked at ({type(error).__name__}: {last_line(error)})")
    driver = f"\n== driver: what its tasks wait for\n{tasks_here()}\n-- its threads:\n{stacks_here()}\n"
    _write(path, report(reason, workers, pending, facts) + driver, say)
    return Sight(workers, pending)


def _write(path: Path, text: str, say: Callable[[str], None]) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # a disk that is full may be why it stalls
        say(f"warning: {path} could not be written: {error}")


@contextlib.asynccontextmanager
async def suspected(looks: Callable[[str], Awaitable[Sight]], path: Path) -> AsyncIterator[None]:
    """A deadline that passes inside, of the policy or of a publication, is told with its suspect."""
    try:
        yield
    except (DeadlineError, PolicyLostError, BaseExceptionGroup) as error:
        cause = first_cause(error)
        lost = isinstance(cause, PolicyLostError)  # the run goes on with another policy
        if not isinstance(cause.__cause__ if lost else cause, DeadlineError):
            raise
        reason = str(cause)
        told = f"{(await looks(reason)).sentence(reason)}; see {path}"
        raise (PolicyLostError if lost else StallError)(told) from error


async def seen(members: Sequence[Member]) -> list[Worker]:
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


async def _known_to_ray(members: Sequence[Member]) -> list[dict[str, Any] | None]:
    """What Ray's head knows of each actor; it knows where a process is that cannot say so itself."""
    from ray._private import state  # the public state API asks the dashboard, which a local Ray does not have

    def ask() -> list[dict[str, Any] | None]:
        return [state.actors(member.handle._actor_id.hex()) or None for member in members]

    try:
        return await within(_ASK_TIMEOUT_S, aside(ask), "asking Ray for its actors")
    except (RunError, RayError):
        return [None] * len(members)


async def _answers(member: Member) -> str | None:
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
    return stacks_here()
