"""A version reaches the replicas whole or not at all, and a replica that fails does not hold up the others.

    reconcile -> announce -> stream -> receive -> verify -> swap (pause, load, resume) -> committed

The broadcast group is policy rank 0 and every worker of the replicas that take part. A replica that fails in a phase
is fenced, and the phase is named; the others get the version in the same publication: once verified they hold every
byte, and before that they form a new group and are sent it again. No replica serves a version that it does not hold.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.errors import PolicyLostError, RunError, last_line
from actors.fleet import Fleet, Replica
from actors.policy_group import PolicyGroup
from actors.rollout import Swapped
from sync.config import SyncConfig
from sync.fanout import fanout_of
from sync.layout import Layout
from sync.member import Membership
from sync.sender import Sent
from sync.transport import Ticket

# What is waited beyond the workers' own deadlines, whose messages name the cause better than ours.
_GRACE_S = 1.0
_PROBE_TIMEOUT_S = 5.0
_MAX_BLIND_RETRIES = 2
"""Groups that may break in a row without anybody to blame: a slow link heals, a broken one does not."""


class _IncompleteError(Exception):
    """The version has not reached everybody; whoever is left needs a new broadcast group."""


@dataclass(slots=True)
class Publisher:
    """Versions go out one by one; `committed` is the last that every serving replica holds."""

    policy: PolicyGroup
    fleet: Fleet
    workers_per_replica: int
    dtype: str
    """The dtype that the replicas hold, in which the weights travel."""
    config: SyncConfig
    member_timeout_s: float
    """Longest wait for a replica to be rebuilt when none is left."""
    drain_timeout_s: float = 0.0
    """How long running requests may take to finish before a swap, when they are not swapped under."""
    committed: int | None = None
    exclusive: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the policy's weights may differ from the committed version's: nobody is admitted meanwhile."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last publication, under `sync/*`."""
    _layout: str = ""
    _group: tuple[int, ...] = ()  # numbers of the replicas in the broadcast group, in the order of their ranks
    _num_blind_retries: int = 0
    _right: tuple[int, str] | None = None
    """The last version whose checksums were compared, and the one that was found right."""

    async def connect(self) -> None:
        """Plan the layout, once for the whole run."""
        self._layout = await self.policy.plan_weights(self.dtype, self.config.bucket_mb)

    async def publish(self, version: int) -> None:
        """Every serving replica holds `version` when this returns, and at least one serves; `exclusive` is held."""
        assert self.committed is None or version == self.committed + 1, "versions are published one by one"
        await self._publish(version, lambda: self.fleet.members)
        self.committed = version

    def resting(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The policy may compute: whoever shares its GPUs rests until the version that is published inside."""
        return self.fleet.resting(self.config.timeout_s + self.drain_timeout_s)

    @contextlib.asynccontextmanager
    async def admitting(self) -> AsyncIterator[None]:
        """A replica that was rebuilt gets the committed version at once while the context is open."""
        async with asyncio.TaskGroup() as tasks:
            admission = tasks.create_task(self._admit(), name="admit")
            yield
            admission.cancel()

    async def _admit(self) -> None:
        while True:
            await self.fleet.wait_for(lambda: self.committed is not None and bool(self.fleet.pending))
            async with self.exclusive:
                if self.committed is not None and self.fleet.pending:
                    await self._publish(self.committed, lambda: self.fleet.pending)

    async def _publish(self, version: int, members: Callable[[], list[Replica]]) -> None:
        while True:  # every round fences somebody, or is a counted retry
            if not self.fleet.members:
                self.fleet.computed()  # or none could be built where the policy computes
                waiting = self.fleet.wait_for(lambda: bool(self.fleet.members))
                await within(self.member_timeout_s, waiting, f"version {version}: rebuilding a rollout replica")
            # Neighbours in rank are neighbours in place, so that a relay crosses from machine to machine seldom.
            replicas = sorted(members(), key=lambda replica: (replica.node, replica.number))
            if not replicas:
                return  # those that were to be admitted have failed
            try:
                await self._reconcile(version, replicas)
                await self._transact(version, replicas)
            except _IncompleteError:
                self._group = ()
            else:
                self._num_blind_retries = 0
                return

    async def _reconcile(self, version: int, replicas: Sequence[Replica]) -> None:
        """The broadcast group is exactly these replicas and the policy."""
        numbers = tuple(replica.number for replica in replicas)
        if numbers == self._group:
            return
        ticket = await self.policy.open_wire(self.config)
        size = 1 + len(replicas) * self.workers_per_replica
        policy = Membership(
            ticket=ticket,
            rank=0,
            world_size=size,
            layout_json=self._layout,
            config=self.config,
            fanout=self._fanout(ticket, replicas),
        )
        ranks = range(1, size, self.workers_per_replica)
        joining = [
            self.policy.join_weights(policy),
            *(
                _answer(replica.handle.join_weights.remote(policy.at(rank)))
                for replica, rank in zip(replicas, ranks, strict=True)
            ),
        ]
        what = f"joining the group of version {version}"
        waits = (within(self.config.timeout_s + _GRACE_S, call, what) for call in joining)
        answers = await asyncio.gather(*waits, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        failures.sort(key=lambda failure: not isinstance(failure, PolicyLostError))
        if failures:  # when one does not come, none gets in
            await self._blame(replicas, what, failures[0])
        self._group = numbers

    def _fanout(self, ticket: Ticket, replicas: Sequence[Replica]) -> int | None:
        """How the version reaches these replicas; the survivors of a failure may be reached in another way."""
        host, _, _ = ticket.address.rpartition(":")
        machines = [host, *(replica.node for replica in replicas for _ in range(self.workers_per_replica))]
        return fanout_of(self.config, machines, Layout.from_json(self._layout).num_bytes)

    async def _transact(self, version: int, replicas: Sequence[Replica]) -> None:
        started = time.perf_counter()
        calls = [replica.handle.begin_receive.remote(version) for replica in replicas]
        announced = await self._phase(f"announcing version {version}", replicas, calls, self.drain_timeout_s)
        if len(announced) < len(replicas):
            raise _IncompleteError
        longest_s = 2 * (self.config.timeout_s + _GRACE_S)  # that of the stream, then our own
        receiving = [replica.handle.receive.remote(version, longest_s) for replica in replicas]
        sent = await self._stream(version, replicas, receiving)
        self.fleet.computed()
        streamed = time.perf_counter()
        here = [replica for replica, _ in await self._phase(f"receiving version {version}", replicas, receiving)]
        calls = [replica.handle.verify.remote(version, sent.digests) for replica in here]
        whole = [replica for replica, _ in await self._phase(f"verifying version {version}", here, calls)]
        swap_timeout_s = self.config.timeout_s + self.drain_timeout_s
        hold = self._is_to_be_compared(version, whole)
        calls = [replica.handle.swap.remote(version, swap_timeout_s, hold) for replica in whole]
        swapped = await self._phase(f"swapping to version {version}", whole, calls, self.drain_timeout_s)
        if hold:
            right = await self._compared(version, [replica for replica, _ in swapped])
            calls = [replica.handle.resume_generation.remote() for replica in right]
            swapped = await self._phase(f"resuming with version {version}", right, calls)
        serving = [replica for replica, _ in swapped]
        if not serving:
            raise _IncompleteError
        if len(serving) < len(replicas):
            self._group = ()  # somebody is missing from it
        self.fleet.serve(serving)
        self._measure(version, sent, started, streamed, [answer for _, answer in swapped])

    async def _stream(self, version: int, replicas: Sequence[Replica], receiving: Sequence[Awaitable[Any]]) -> Sent:
        """Policy rank 0 sends; when the wire breaks, whoever does not answer any more has broken it."""
        deadline_s = self.config.timeout_s + _GRACE_S
        sending = asyncio.ensure_future(self.policy.send_weights(deadline_s))
        watching = asyncio.ensure_future(_first_failure(receiving))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED, timeout=deadline_s)
            if not sending.done():  # a wire may take as long as its deadline to notice who is gone; Ray tells at once
                await self.policy.abort_weights()
            sent = await sending
        except (RayError, RunError) as error:
            await self._blame(replicas, f"streaming version {version}", error)
        finally:
            watching.cancel()
            sending.cancel()
        assert sent.version == version, f"the policy sent version {sent.version} for {version}"
        return sent

    def _is_to_be_compared(self, version: int, replicas: Sequence[Replica]) -> bool:
        """Then no replica samples a token between its swap and the verdict."""
        every = self.config.checksum_every
        return bool(every) and version % every == 0 and (len(replicas) >= 2 or self._known(version) is not None)

    def _known(self, version: int) -> str | None:
        """The checksum that this version's replicas were found to have; a newcomer alone is held against it."""
        return self._right[1] if self._right is not None and self._right[0] == version else None

    async def _compared(self, version: int, replicas: list[Replica]) -> list[Replica]:
        """Those whose weights are right, by vLLM's own checksums; the others are fenced.

        One alone is not compared, unless the version has been compared before.
        """
        known = self._known(version)
        if len(replicas) < 2 and known is None:
            return replicas
        phase = f"comparing checksums of version {version}"
        answers = await self._phase(phase, replicas, [replica.handle.checksum.remote() for replica in replicas])
        right = right_checksum([checksum for _, checksum in answers], known)
        if right is not None:
            self._right = version, right
        for replica, checksum in answers:
            if checksum != right:
                self.fleet.fence(replica.number, f"{phase}: its weights are not those of the other replicas")
        return [replica for replica, checksum in answers if checksum == right]

    async def _blame(self, replicas: Sequence[Replica], what: str, error: BaseException) -> NoReturn:
        """All failed together: whoever does not answer any more is the cause, and the others try again without it."""
        if isinstance(error, PolicyLostError) or not isinstance(error, RayError | RunError):
            raise error
        calls = [replica.handle.ping.remote() for replica in replicas]
        alive = await self._phase(f"{what} ({last_line(error)})", replicas, calls, probe=True)
        if len(alive) == len(replicas):
            self._num_blind_retries += 1
            if self._num_blind_retries > _MAX_BLIND_RETRIES:
                raise RunError(f"{what} failed, though all replicas answer: {last_line(error)}") from error
        raise _IncompleteError

    async def _phase(
        self,
        phase: str,
        replicas: Sequence[Replica],
        calls: Sequence[Awaitable[Any]],
        extra_s: float = 0.0,
        probe: bool = False,
    ) -> list[tuple[Replica, Any]]:
        """Who came through, with their answers; the others are fenced for what stopped them."""
        timeout_s = _PROBE_TIMEOUT_S if probe else self.config.timeout_s + extra_s + _GRACE_S
        waits = (within(timeout_s, call, phase) for call in calls)
        answers = await asyncio.gather(*waits, return_exceptions=True)
        through = []
        for replica, answer in zip(replicas, answers, strict=True):
            match answer:
                case DeadlineError():  # names the phase itself
                    self.fleet.fence(replica.number, str(answer))
                case RayError() | RunError():
                    self.fleet.fence(replica.number, f"{phase}: {last_line(answer)}")
                case BaseException():
                    raise answer
                case _:
                    through.append((replica, answer))
        return through

    def _measure(self, version: int, sent: Sent, started: float, streamed: float, swapped: Sequence[Swapped]) -> None:
        self.metrics = {
            "weights/version": float(version),
            "sync/bytes": float(sent.num_bytes),
            **({} if sent.num_changed is None else {"sync/changed": float(sent.num_changed)}),
            "sync/stream_s": streamed - started,
            "sync/pause_s": max(s.pause_s for s in swapped),
            "sync/swap_s": max(s.swap_s for s in swapped),
            **({"sync/rest_s": rest_s} if (rest_s := max(s.rest_s for s in swapped)) else {}),
            "sync/total_s": time.perf_counter() - started,
            "sync/replicas": float(len(swapped)),
            "sync/rebuilt": float(self.fleet.num_rebuilt),
        }


def right_checksum(answers: Sequence[str], known: str | None) -> str | None:
    """What was found right before, else what most hold; None where no checksum is that of most: nobody is right."""
    if known is not None or not answers:
        return known
    usual, count = Counter(answers).most_common(1)[0]
    return usual if 2 * count > len(answers) else None


async def _first_failure(calls: Sequence[Awaitable[Any]]) -> None:
    """Returns when one of the calls has failed; never when none does."""
    tasks = [asyncio.ensure_future(_answer(call)) for call in calls]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if not any(task.exception() for task in tasks if task.done()):
            await asyncio.Event().wait()
    finally:
        for task in tasks:
            task.cancel()


async def _answer(call: Awaitable[Any]) -> Any:
    """Ray's references are awaitable, and no coroutines."""
    return await call
