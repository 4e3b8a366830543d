"""While engines are started and none serves, that is what a run waits for."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from actors.fleet import Fleet
from actors.pacer import AsyncPacer
from actors.recipe.upkeep import LivenessConfig
from actors.router import Router
from actors.run.sight import Sight, StallError
from actors.run.watchdog import Watchdog
from algorithms.pacing import Pacer
from tests.actors.fleets import fleet_of
from tests.actors.groups import ready
from tests.actors.run.test_recovery import Engine
from tests.virtual_time import run_virtually


async def test_a_fleet_is_rebuilding_while_no_replica_serves_and_one_is_about_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    fleet: Fleet = fleet_of([Engine(), Engine()])
    await fleet.start()
    assert fleet.rebuilding, "they wait for a version, and no group gets on before"
    started = time.monotonic()
    fleet.serve(fleet.members)
    assert not fleet.rebuilding
    served = fleet.serves_since
    assert served >= started
    fleet.fence(0, "it died")
    assert not fleet.rebuilding, "the other one serves"
    fleet.serve(fleet.members)
    assert fleet.serves_since == served, "one has served all the time"
    fleet.fence(1, "it died")
    assert fleet.rebuilding


class Pinged(Engine):
    """An engine whose pings fail as it is told, one after the other, and the last way for ever; None answers."""

    def __init__(self, *pings: Exception | None) -> None:
        super().__init__()
        self.pings = [*pings]
        self.ping = SimpleNamespace(remote=self._ping)

    async def _ping(self) -> None:
        end = self.pings.pop(0) if len(self.pings) > 1 else self.pings[0]
        if end is not None:
            raise end


def test_a_ping_that_does_not_reach_a_replica_is_made_again_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    away, said = ActorUnavailableError("the connection was reset", b"0" * 16), []
    back, gone, dead = Pinged(away, away, None), Pinged(away), Pinged(away, ActorDiedError())

    async def run() -> None:
        fleet = fleet_of([back, gone, dead])
        fleet._say = said.append
        await fleet.start()
        fleet.serve(fleet.members)
        with pytest.raises(BaseExceptionGroup, match="unhandled errors"):  # fleet_of replaces nobody
            async with fleet.supervised(LivenessConfig(every_s=5.0, timeout_s=20.0)):
                await asyncio.sleep(3600.0)
        assert [replica.number for replica in fleet.members] == [0]

    run_virtually(run())
    assert said == [
        "warning: rollout replica 1 is fenced and will be rebuilt: ping of the engine took longer than 20 s",
        "warning: rollout replica 2 is fenced and will be rebuilt: The actor died unexpectedly before finishing this "
        "task.",
    ]


async def test_a_run_does_not_stall_while_workers_are_started() -> None:
    said: list[str] = []
    unused: Any = None
    watchdog = Watchdog(
        (), (), (), unused, unused, unused, unused, unused, "exit", said.append,
        starting=lambda: "reward worker 0 is being started again",
    )  # fmt: skip
    assert await watchdog.idle("no group finished for 60 s") is None
    assert said == [
        "warning: no group finished for 60 s: reward worker 0 is being started again, and it waits for that"
    ]


@pytest.mark.parametrize("finishes", [True, False])
async def test_a_run_does_not_stall_when_a_group_finishes_while_the_watchdog_looks(
    finishes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pacer = AsyncPacer(Pacer(groups_per_batch=1, max_staleness=0, num_batches=1), stall_timeout_s=0.1)
    await pacer.published(0)
    slot = await anext(pacer.slots())

    async def look(*_: Any) -> Sight:
        if finishes:
            await pacer.finished(slot, ready(slot, 0))
        return Sight((), ())

    monkeypatch.setattr("actors.run.watchdog.look", look)
    said: list[str] = []
    publisher: Any = type("Publisher", (), {"committed": 0})
    router = Router(max_groups_per_replica=1, num_generations=1, max_completion_length=1)
    watchdog = Watchdog((), (), (), fleet_of([]), router, pacer, publisher, tmp_path / "stall.txt", "exit", said.append)
    pacer.on_stall = watchdog.idle
    if not finishes:
        with pytest.raises(StallError, match=r"no group finished for 0 s while the policy waits"):
            await pacer.take()
        assert not said
        return
    taken = await pacer.take()
    assert taken is not None
    assert [group.slot for group in taken.batch] == [slot]
    assert "something has changed meanwhile" in said[0]
