"""A version reaches the replicas whole or not at all, and a replica that fails does not hold up the others.

    reconcile -> announce -> stream -> verify -> swap (pause, load, resume) -> committed

The broadcast group is policy rank 0 and every worker of the replicas that take part. A replica that fails in a phase
is fenced, and the phase is named; the others get the version in the same publication: once verified they hold every
byte, and before that they form a new group and are sent it again. No replica serves a version that it does not hold.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ray.exceptions import RayError

from actors.deadline import within
from actors.errors import RunError, last_line
from actors.fleet import Fleet, Replica
from actors.policy_group import PolicyGroup
from actors.rollout import Swapped
from sync.config import SyncConfig
from sync.sender import Sent

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
    _num_groups: int = 0
    _num_blind_retries: int = 0

    async def connect(self) -> None:
        """Plan the layout, once for the whole run."""
        self._layout = await self.policy.plan_weights(self.dtype, self.config.bucket_mb)

    async def publish(self, version: int) -> None:
        """Every serving replica holds `version` when this returns, and at least one serves; `exclusive` is held."""
        assert self.committed is None or version == self.committed + 1, "versions are published one by one"
        await self._publish(version, lambda: self.fleet.members)
        self.committed = version

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
                waiting = self.fleet.wait_for(lambda: bool(self.fleet.members))
                await within(self.member_timeout_s, waiting, f"version {version}: rebuilding a rollout replica")
            replicas = members()
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
        timeout_s, size = self.config.timeout_s, 1 + len(replicas) * self.workers_per_replica
        self._num_groups += 1
        group = f"weights-{self._num_groups}"
        store = await self.policy.open_store(timeout_s)
        ranks = range(1, size, self.workers_per_replica)
        common = (size, self._layout, timeout_s, self.config.delta)
        joining = [
            self.policy.join_weights(self._layout, group, size, self.config),
            *(
                _answer(replica.handle.join_weights.remote(store, group, rank, *common))
                for replica, rank in zip(replicas, ranks, strict=True)
            ),
        ]
        what = f"joining the group of version {version}"
        waits = (within(timeout_s + _GRACE_S, call, what) for call in joining)
        answers = await asyncio.gather(*waits, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures:  # when one does not come, none gets in
            await self._blame(replicas, what, failures[0])
        self._group = numbers

    async def _transact(self, version: int, replicas: Sequence[Replica]) -> None:
        started = time.perf_counter()
        calls = [replica.handle.begin_receive.remote(version) for replica in replicas]
        announced = await self._phase(f"announcing version {version}", replicas, calls)
        if len(announced) < len(replicas):
            raise _IncompleteError
        sent = await self._stream(version, replicas)
        streamed = time.perf_counter()
        calls = [replica.handle.verify.remote(version, sent.digests, self.config.timeout_s) for replica in replicas]
        whole = await self._phase(f"verifying version {version}", replicas, calls)
        calls = [replica.handle.swap.remote(version, self.config.timeout_s) for replica, _ in whole]
        swapping = [replica for replica, _ in whole]
        swapped = await self._phase(f"swapping to version {version}", swapping, calls, self.drain_timeout_s)
        if not swapped:
            raise _IncompleteError
        if len(swapped) < len(replicas):
            self._group = ()  # somebody is missing from it
        self.fleet.serve(replica for replica, _ in swapped)
        self._measure(version, sent, started, streamed, [answer for _, answer in swapped])

    async def _stream(self, version: int, replicas: Sequence[Replica]) -> Sent:
        """Policy rank 0 sends; when the wire breaks, whoever does not answer any more has broken it."""
        try:
            sent = await self.policy.send_weights(self.config.timeout_s + _GRACE_S)
        except (RayError, RunError) as error:
            await self._blame(replicas, f"streaming version {version}", error)
        assert sent.version == version, f"the policy sent version {sent.version} for {version}"
        return sent

    async def _blame(self, replicas: Sequence[Replica], what: str, error: BaseException) -> NoReturn:
        """All failed together: whoever does not answer any more is the cause, and the others try again without it."""
        if not isinstance(error, RayError | RunError):
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
            "sync/total_s": time.perf_counter() - started,
            "sync/replicas": float(len(swapped)),
            "sync/rebuilt": float(self.fleet.num_rebuilt),
        }


async def _answer(call: Awaitable[Any]) -> Any:
    """Ray's references are awaitable, and no coroutines."""
    return await call
