"""While engines are started and none serves, that is what a run waits for."""

import time
from pathlib import Path
from typing import Any

import pytest

from actors.fleet import Fleet
from actors.pacer import AsyncPacer
from actors.router import Router
from actors.run.sight import Sight, StallError
from actors.run.watchdog import Watchdog
from algorithms.pacing import Pacer
from tests.actors.fleets import fleet_of
from tests.actors.groups import ready
from tests.actors.run.test_recovery import Engine


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
