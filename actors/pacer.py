"""The pacer's decisions as waits: slots appear when a group may be dispatched, batches when one may be trained.

All decisions are made in algorithms/pacing.py. Here coroutines wait for them, and the time that each side waits is
measured together with the reason.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import ray

from actors.deadline import DeadlineError
from actors.errors import RunError
from algorithms.pacing import Pacer
from algorithms.slots import PacerState, Slot, Taken
from algorithms.types import GroupSummary

Decision = TypeVar("Decision")


@dataclass(frozen=True, slots=True)
class ReadyGroup:
    """A scored group: its summary, and the reference behind which its tokens are."""

    slot: Slot
    summary: GroupSummary
    scored: ray.ObjectRef


@dataclass(frozen=True, slots=True)
class TakenGroups:
    """What leaves the pacer with a batch (algorithms/pacing.py, Taken), the scored groups in hand."""

    batch: list[ReadyGroup]
    aborted: list[Slot]
    """Attempts in flight that can no longer be trained in time; their prompts are sampled again."""
    requeued: list[ReadyGroup]
    """The same of groups that were scored already."""
    left_out: list[ReadyGroup]
    """Scored groups that no step will train."""


class AsyncPacer:
    """One condition: every change of the pacer's state wakes whoever waits for a decision."""

    def __init__(self, pacer: Pacer, stall_timeout_s: float) -> None:
        """`stall_timeout_s`: no group finished for this long while the policy waits means that the run hangs."""
        self._pacer = pacer
        self._stall_timeout_s = stall_timeout_s
        self._changed = asyncio.Condition()
        self._ready: dict[int, ReadyGroup] = {}
        self._version: int | None = None
        self._stopped = False
        self.why_stopped = ""
        """What whoever has stopped the run says of it."""
        self.progress_at = time.monotonic()
        """When something last changed, or the policy began to wait."""
        self.there_since: Callable[[], float] = lambda: 0.0
        """The time.monotonic() at which the last worker was there again without which no group gets on."""
        self.num_building: Callable[[], int] = lambda: 0
        """How many engines are being built where the policy computes: no batch is given out meanwhile, so that a stop
        is heard. Whoever changes it calls `look_again`."""
        self.waits: dict[str, float] = defaultdict(float)
        """Seconds waited so far: `policy/<why>` (for a batch), `dispatch/<why>` (for a slot), and `rollout/idle`, when
        no group was in flight."""
        self._idle_since: float | None = time.monotonic()
        self.on_stall: Callable[[str], Awaitable[RunError | None]] | None = None
        """Asked once no group finishes any more, with the reason: what stops the run, or None to wait on. What changes
        while it is asked counts: then the run goes on, whatever it says."""

    @property
    def num_in_flight(self) -> int:
        return self._pacer.num_in_flight

    @property
    def num_ready(self) -> int:
        return self._pacer.num_ready

    @property
    def left_out_cause(self) -> str:
        return self._pacer.left_out_cause

    @property
    def exhausted(self) -> bool:
        """Whether the last batch has been taken."""
        return self._pacer.exhausted

    @property
    def in_flight(self) -> list[Slot]:
        return list(self._pacer.in_flight.values())

    @property
    def leftover(self) -> tuple[int, ...]:
        """Ordinals that no step will train any more, once the run is over."""
        return self._pacer.leftover()

    @property
    def pipeline_depth(self) -> int:
        return self._pacer.pipeline_depth

    def state(self) -> tuple[PacerState, list[ReadyGroup]]:
        """A snapshot of the pacer, and the scored groups that are in it."""
        state = self._pacer.state()
        return state, [self._ready[ready.slot.ordinal] for ready in state.ready]

    def restore(self, state: PacerState, groups: list[ReadyGroup]) -> None:
        """Go on from a snapshot, before anybody waits; ready groups that are not among `groups` are sampled anew."""
        self._ready = {group.slot.ordinal: group for group in groups}
        self._pacer.restore(state, self._ready)

    async def set_depth(self, pipeline_depth: int) -> None:
        """From now on as many groups may be dispatched and not yet trained."""
        async with self._change():
            self._pacer.pipeline_depth = pipeline_depth

    async def set_capacity(self, max_in_flight: int) -> None:
        """From now on the replicas may hold so many groups; what they hold already they keep."""
        async with self._change():
            self._pacer.max_in_flight = max_in_flight

    async def slots(self) -> AsyncIterator[Slot]:
        """Leave to dispatch, one group at a time, until the last batch has been taken."""
        while True:
            slot = await self._wait("dispatch", self._dispatch, self._why_no_slot)
            if slot is None:
                return
            yield slot

    async def stop(self, why: str = "") -> None:
        """No slot is given out and no batch any more; what is in flight goes on. `why` is what the user reads."""
        async with self._change():
            self._stopped = True
            self.why_stopped = self.why_stopped or why

    async def take(self) -> TakenGroups | None:
        """The next batch, oldest first; None after `stop`. Raises DeadlineError when no group finishes any more."""
        self.progress_at = time.monotonic()
        taken = await self._wait("policy", self._take, self._why_no_batch)
        if taken is None:
            return None
        return TakenGroups(
            batch=[self._ready.pop(ordinal) for ordinal in taken.batch],
            aborted=[slot for slot in taken.requeued if slot.ordinal not in self._ready],
            requeued=[self._ready.pop(slot.ordinal) for slot in taken.requeued if slot.ordinal in self._ready],
            left_out=[self._ready.pop(ordinal) for ordinal in taken.left_out],
        )

    async def finished(self, slot: Slot, group: ReadyGroup) -> bool:
        """Hand in a scored group; False when another attempt came first."""
        async with self._change():
            accepted = self._pacer.finished(slot, group.summary.oldest_version, group.summary.newest_version)
            if accepted:
                self._ready[slot.ordinal] = group
            return accepted

    async def failed(self, slot: Slot) -> bool:
        async with self._change():
            return self._pacer.failed(slot)

    async def interrupted(self, slot: Slot, oldest_version: int | None) -> bool:
        """The attempt goes on elsewhere; False when it was aborted and its prompt is to be sampled anew."""
        async with self._change():
            return self._pacer.interrupted(slot, oldest_version)

    async def dropped(self, slot: Slot) -> bool:
        async with self._change():
            return self._pacer.dropped(slot)

    async def published(self, version: int) -> None:
        """Every serving replica holds `version`."""
        async with self._change():
            self._version = version

    async def look_again(self) -> None:
        """Whether the policy may compute has changed."""
        async with self._changed:
            self._changed.notify_all()

    def _take(self) -> Taken | None:
        if self._why_no_batch() == "engine":
            self.progress_at = time.monotonic()  # its start has a deadline of its own, and nobody hangs
            return None
        return self._pacer.take()

    def _why_no_batch(self) -> str | None:
        return self._pacer.waiting() or ("engine" if self.num_building() else None)

    def _dispatch(self) -> Slot | None:
        return None if self._version is None else self._pacer.dispatch(self._version)

    def _why_no_slot(self) -> str | None:
        return "version" if self._version is None else self._pacer.blocked(self._version)

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """The pacer's state changes inside; everybody who waits looks again afterwards."""
        async with self._changed:
            self.progress_at = time.monotonic()
            yield
            self._count_idle()
            self._changed.notify_all()

    def _count_idle(self) -> None:
        now = time.monotonic()
        if self._idle_since is not None:
            self.waits["rollout/idle"] += now - self._idle_since
        self._idle_since = None if self._pacer.num_in_flight else now

    async def _wait(
        self, side: str, decide: Callable[[], Decision | None], why: Callable[[], str | None]
    ) -> Decision | None:
        """Until `decide` gives something; None once the run is over and it never will."""
        while True:
            async with self._changed:
                if self._stopped:
                    return None
                reason = why()
                decision = decide()
                if decision is not None:
                    self._count_idle()
                    self._changed.notify_all()
                    return decision
                if self._pacer.exhausted:
                    return None
                started = time.monotonic()
                stall = await self._woken(side)
            if stall is not None:  # looking takes its time: whatever changes meanwhile must not wait for the lock
                await self._stalled(stall)
            self.waits[f"{side}/{reason}"] += time.monotonic() - started

    async def _woken(self, side: str) -> str | None:
        """After a change, or some time; why it is a stall, if it is one."""
        idle_s = time.monotonic() - max(self.progress_at, self.there_since())
        if side == "policy" and idle_s >= self._stall_timeout_s:
            return f"no group finished for {idle_s:.0f} s while the policy waits"
        # The rollouts may wait as long as the policy steps: those have deadlines of their own.
        left = self._stall_timeout_s - idle_s if side == "policy" else self._stall_timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self._changed.wait()
        return None

    async def _stalled(self, reason: str) -> None:
        if self.on_stall is None:
            late = ", ".join(f"{s.ordinal} (attempt {s.attempt})" for s in self._pacer.in_flight.values()) or "none"
            raise DeadlineError(f"{reason}; groups in flight: {late}")
        before = self.progress_at
        error = await self.on_stall(reason)
        if self.progress_at != before:
            return
        if error is not None:
            raise error
        self.progress_at = time.monotonic()

    def facts(self) -> dict[str, str]:
        """What it waits for, in words."""
        return {
            "the policy waits for": self._why_no_batch() or "nothing",
            "no group is dispatched because of": self._why_no_slot() or "nothing",
            "groups": f"{self.num_in_flight} in flight, {self.num_ready} ready, depth {self.pipeline_depth}",
        }
