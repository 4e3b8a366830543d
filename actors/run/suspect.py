"""Who holds up a run that stalls, from what was seen of its workers: one name, and the reason.

A group waits for its replica, which waits for the reference, which waits for the reward; each of them is asked to
answer, and each process behind it is looked at. What cannot go on by itself weighs more than what is merely slow, and
among equals the one that stands furthest down the chain does: the others wait for it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

POLICY, CRITIC = "policy rank", "critic rank"
REPLICA, REFERENCE, REWARD = "rollout replica", "reference worker", "reward worker"
"""The roles of workers, down the chain."""
_ROLES = (POLICY, CRITIC, REPLICA, REFERENCE, REWARD)
_CHILD = "actors.rewards.child"
"""In the command of a process that runs reward functions."""
# Where a process stands when it waits for work.
_IDLE = re.compile(
    r"/(threading|selectors|queue|socket)\.py$|/(asyncio|concurrent|multiprocessing)/|/rewards/pipe\.py$"
    r"|/ray/_private/worker\.py$"
)
_FRAME = re.compile(r"^ {4}(\S.*) \((.+):(\d+)\)$", re.MULTILINE)


class Trouble(IntEnum):
    """How sure it is that a worker does not go on by itself."""

    NONE = 0
    HOLDS = 1  # it answers, and has the group
    BUSY = 2  # it runs a reward function
    SILENT = 3  # it lives, and does not answer
    STOPPED = 4  # one of its processes is stopped by a signal
    DEAD = 5


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a worker, as its node sees it."""

    pid: int
    command: str
    state: str
    """The kernel's letter: R runs, S sleeps, D waits for a device, T is stopped, Z has ended; empty if unknown."""
    stack: str
    """What py-spy says, or why it says nothing."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One actor of the run, and the processes that it has started, its own first."""

    role: str
    number: int
    node: str
    alive: bool
    """Ray counts it among the living."""
    answers: bool
    """It answered when it was asked, in time."""
    processes: tuple[Process, ...] = ()
    note: str = ""
    """What could not be found out, and why."""
    account: str = ""
    """Its stacks as it told them itself, when it answered: less than py-spy sees, and nothing of its children."""

    @property
    def name(self) -> str:
        return f"{self.role} {self.number}"


@dataclass(frozen=True, slots=True)
class Pending:
    """One group on its way."""

    ordinal: int
    attempt: int
    replica: int
    seconds: float


def suspect(workers: Sequence[Worker], pending: Sequence[Pending]) -> tuple[Worker, str] | None:
    """The worker that holds up the run, and a clause that says why; None when nothing was seen of any.

    Workers behind whom no group waits are suspected only when they cannot go on at all.
    """
    waiting = Counter(place for group in pending for place in _chain(group, workers))
    judged = []
    for worker in workers:
        num_waiting = waiting[worker.role, worker.number]
        trouble, why = _judge(worker, num_waiting > 0 or not pending)
        if trouble > Trouble.NONE:
            judged.append((trouble, num_waiting, _ROLES.index(worker.role), -worker.number, worker, why))
    if not judged:
        return None
    *_, worker, why = max(judged, key=lambda one: one[:4])
    return worker, why


def sentence(workers: Sequence[Worker], pending: Sequence[Pending], reason: str) -> str:
    """`reason` with the name of the suspect."""
    found = suspect(workers, pending)
    if not workers:
        return f"{reason}: no worker could be looked at"
    if found is None:
        return f"{reason}: every worker answers and none has a group; the schedule itself is stuck"
    worker, why = found
    pid = f"pid {worker.processes[0].pid}, " if worker.processes else ""
    return f"{reason}: {worker.role} {worker.number} ({pid}node {worker.node or 'unknown'}) {why}"


def _chain(group: Pending, workers: Sequence[Worker]) -> Iterator[tuple[str, int]]:
    """The workers on which the group depends, by role and number."""
    yield REPLICA, group.replica
    for role in (REFERENCE, REWARD):
        num_workers = sum(worker.role == role for worker in workers)
        if num_workers:
            yield role, group.ordinal % num_workers


def _judge(worker: Worker, is_waited_for: bool) -> tuple[Trouble, str]:
    if not worker.alive:
        return Trouble.DEAD, "is dead"
    stopped = [process for process in worker.processes if process.state in ("T", "t")]
    if stopped:
        which = "" if stopped[0] is worker.processes[0] else f" process {stopped[0].pid}"
        return Trouble.STOPPED, f"is stopped{' in its' + which if which else ''} (state T: a signal holds it)"
    if not is_waited_for:
        return Trouble.NONE, ""
    if not worker.answers:
        where = place(worker.processes[0].stack) if worker.processes else ""
        return Trouble.SILENT, f"does not answer{': it is in ' + where if where else ''}"
    for child in worker.processes[1:]:
        where = place(child.stack) if _CHILD in child.command else ""
        if where:
            return Trouble.BUSY, f"is in {where}"
    return (Trouble.HOLDS, "answers, and still has the group") if worker.role == REPLICA else (Trouble.NONE, "")


def place(stack: str) -> str:
    """`function, file:line` of the innermost frame of the first thread; empty when the thread waits for work."""
    frames = _FRAME.findall(stack.partition("\n\n")[2].partition("\nThread")[0])
    if not frames or _IDLE.search(frames[0][1]):
        return ""
    function, file, line = frames[0]
    return f"{function}, {file}:{line}"


def report(reason: str, workers: Sequence[Worker], pending: Sequence[Pending], facts: dict[str, str]) -> str:
    """All that was seen, for stall.txt."""
    lines = [sentence(workers, pending, reason), ""]
    lines += [f"{name}: {value}" for name, value in facts.items()]
    lines += ["", "groups in flight:" if pending else "no group is in flight"]
    lines += [
        f"  group {group.ordinal} (attempt {group.attempt}): on {REPLICA} {group.replica} for {group.seconds:.1f} s"
        for group in sorted(pending, key=lambda group: -group.seconds)
    ]
    for worker in workers:
        state = "dead" if not worker.alive else "answers" if worker.answers else "does not answer"
        lines += ["", f"== {worker.role} {worker.number}, node {worker.node or 'unknown'}: {state}"]
        lines += [f"   {worker.note}"] * bool(worker.note)
        for process in worker.processes:
            lines += [f"-- pid {process.pid}, state {process.state or 'unknown'}: {process.command}", process.stack]
        if worker.account and not any(process.stack.startswith("Python") for process in worker.processes[:1]):
            lines += ["-- its own account:", worker.account]
    return "\n".join(lines) + "\n"
