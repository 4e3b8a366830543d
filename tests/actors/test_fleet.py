"""While engines are started and none serves, that is what a run waits for."""

from typing import Any

import pytest

from actors.fleet import Fleet
from actors.run.watchdog import Watchdog
from tests.actors.fleets import fleet_of
from tests.actors.run.test_recovery import Engine


async def test_a_fleet_is_rebuilding_while_no_replica_serves_and_one_is_about_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    fleet: Fleet = fleet_of([Engine(), Engine()])
    await fleet.start()
    assert not fleet.rebuilding, "they wait for a version, which has a deadline"
    fleet.serve(fleet.members)
    assert not fleet.rebuilding
    fleet.fence(0, "it died")
    assert not fleet.rebuilding, "the other one serves"
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
