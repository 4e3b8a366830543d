"""Replicas come and go while a run trains: between two numbers, as the cluster has room, and nobody waits for them.

Who joins and who leaves is decided in placement/elastic.py; here the cluster is looked at, and the fleet is told.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import ray

from actors.deadline import DeadlineError, aside, within
from actors.errors import RunError
from actors.fleet import Fleet, State
from actors.pacer import AsyncPacer
from actors.run.machine import answers
from actors.scaling import ScaleFiles
from placement.config import RolloutPoolConfig
from placement.elastic import Seat, Tenant, moves, num_placed
from placement.seats import Seats

_EVERY_S = 1.0
_LOOK_TIMEOUT_S = 60.0
_DRAIN_MARGIN_S = 10.0
"""A replica on a machine that is being drained is gone so long before the machine is."""
_TENANTS = {State.SERVING: Tenant.SERVING, State.LEAVING: Tenant.LEAVING}


@dataclass(slots=True)
class Elastic:
    """The rollout pool of a run in which replicas come and go."""

    pool: RolloutPoolConfig
    seats: Seats
    fleet: Fleet
    requests: ScaleFiles
    grace_s: float
    capacity_timeout_s: float
    say: Callable[[str], None]
    target: int = 0
    """So many replicas are wanted."""
    lacking_since: float | None = None
    """Since when fewer than `min_workers` have a place."""

    def __post_init__(self) -> None:
        self.target = self.pool.num_workers
        self.fleet.is_gone = self._is_gone
        self.requests.clear()

    @property
    def waits_for(self) -> str:
        """What a run without replicas waits for; empty when it has as many as it needs."""
        if self.lacking_since is None:
            return ""
        return f"fewer than pools.rollout.min_workers={self.pool.least} rollout replicas have a machine"

    @contextlib.asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Replicas come and go while the context is open; RunError when there are too few for too long."""
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(self._run(), name="elastic")
            yield
            running.cancel()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                wanted = self.requests.take(self._refused)
                if wanted is not None and wanted != self.target:
                    self.say(f"{wanted} rollout replicas are wanted from here on, instead of {self.target}")
                    self.target = wanted
                with contextlib.suppress(DeadlineError):  # the head is away, which others watch
                    await self._move(tasks)
                await asyncio.sleep(_EVERY_S)

    def _refused(self, wanted: int) -> str | None:
        pool = self.pool
        if pool.least <= wanted <= pool.most:
            return None
        return f"{wanted} is not within pools.rollout.min_workers={pool.least} and max_workers={pool.most}"

    async def _move(self, tasks: asyncio.TaskGroup) -> None:
        seats = await within(_LOOK_TIMEOUT_S, aside(self.seats.look), "the state of the rollout pool")
        seats = [self._with_tenant(seat) for seat in seats]
        now = moves(self.target, seats)
        for _ in range(now.ask):
            self.seats.ask()
        for number in now.join:
            tasks.create_task(self.fleet.join(number), name=f"join-{number}")
        for number, cause in now.leave:
            tasks.create_task(self._leave(number, cause), name=f"leave-{number}")
        for number in now.give_back:
            self.seats.give_back(number)
        self._watch_least(num_placed(seats))

    def _with_tenant(self, seat: Seat) -> Seat:
        replica = self.fleet.on(seat.number)
        return seat if replica is None else replace(seat, tenant=_TENANTS.get(replica.state, Tenant.STARTING))

    async def _leave(self, number: int, cause: str) -> None:
        """The replica goes, and then its seat."""
        replica = self.fleet.on(number)
        if replica is None:
            return
        until = self.seats.drain_by.get(number)
        grace_s = self.grace_s if until is None else min(self.grace_s, until - time.time() - _DRAIN_MARGIN_S)
        await self.fleet.leave(replica.number, max(0.0, grace_s), cause)

    def _watch_least(self, placed: int) -> None:
        """RunError when the pool has been too small for too long."""
        if placed >= self.pool.least:
            self.lacking_since = None
            return
        now = time.monotonic()
        if self.lacking_since is None:
            self.lacking_since = now
            self.say(
                f"warning: {placed} of at least {self.pool.least} rollout replicas have a machine; the run waits for "
                f"more, {self.capacity_timeout_s:g} s at most"
            )
        if now - self.lacking_since > self.capacity_timeout_s:
            raise RunError(
                f"pool 'rollout': {placed} of at least {self.pool.least} replicas (pools.rollout.min_workers) have had "
                f"a machine for {self.capacity_timeout_s:g} s (rollout.capacity_timeout_s): add machines, or lower "
                "min_workers; the same command goes on from the newest checkpoint"
            )

    async def _is_gone(self, number: int) -> bool:
        """Whether the machine of a seat does not answer; Ray itself needs many seconds to give it up."""
        try:
            there = await within(_LOOK_TIMEOUT_S, aside(_answers, self.seats, number), f"seat {number}'s machine")
        except DeadlineError:
            return False
        if not there:
            self.seats.condemn(number)
        return not there


def _answers(seats: Seats, number: int) -> bool:
    """Whether Ray's own process on the machine of a seat does."""
    node = next((seat.node for seat in seats.look() if seat.number == number), "")
    found = [each for each in ray.nodes() if each["NodeID"] == node and each["Alive"]]
    return bool(found) and answers(f"{found[0]['NodeManagerAddress']}:{found[0]['NodeManagerPort']}")


@contextlib.asynccontextmanager
async def capacity_followed(
    fleet: Fleet, pacer: AsyncPacer, capacity: Callable[[int], int] | None
) -> AsyncIterator[None]:
    """As many groups are in flight as so many serving replicas may hold, while the context is open.

    `capacity` is None where the number of replicas does not change.
    """
    if capacity is None:
        yield
        return
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(_follow(fleet, pacer, capacity), name="follow the capacity")
        yield
        following.cancel()


async def _follow(fleet: Fleet, pacer: AsyncPacer, capacity: Callable[[int], int]) -> NoReturn:
    while True:
        known = fleet.num_serving
        await pacer.set_capacity(capacity(known))
        await fleet.wait_for(partial(_differs, fleet, known))


def _differs(fleet: Fleet, known: int) -> bool:
    return fleet.num_serving != known
