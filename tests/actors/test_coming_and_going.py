"""The controller's loop while replicas join and leave at any moment: the ledger says that nothing is lost."""

import asyncio
import random
from pathlib import Path

import pytest

from actors.elastic import capacity_followed
from actors.fleet import State
from algorithms.config import StalenessConfig
from tests.actors.test_controller import Bench
from tests.virtual_time import run_virtually

NUM_STEPS = 25
MOST = 4


@pytest.mark.parametrize("when_stale", ["pace", "mask", "requeue"])
@pytest.mark.parametrize("seed", range(3))
def test_replicas_that_come_and_go_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, when_stale: str
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    most_in_flight: list[int] = []

    async def run() -> Bench:
        bench = Bench(tmp_path, num_steps=NUM_STEPS, staleness=StalenessConfig(max_staleness=2, when_stale=when_stale))
        draw = random.Random(seed)
        bench.pauses = {(ordinal, attempt): draw.expovariate(100) for ordinal in range(200) for attempt in range(9)}
        fleet = bench.fleet

        async def come_and_go() -> None:
            async with asyncio.TaskGroup() as tasks:
                bundle = 2
                while not bench.pacer.exhausted:
                    await asyncio.sleep(draw.uniform(0.0, 0.03))
                    serving = [replica.number for replica in fleet.members if replica.state is State.SERVING]
                    if len(fleet.members) < MOST and draw.random() < 0.5:
                        await fleet.join(bundle)
                        bundle += 1
                    elif len(serving) > 1:
                        grace_s = draw.choice([0.0, 0.005, 0.05])
                        tasks.create_task(fleet.leave(draw.choice(serving), grace_s, "nobody needs it"))
                    fleet.serve(fleet.members)  # at the committed version, as newcomers are admitted
                    most_in_flight.append(bench.pacer.num_in_flight)

        async with (
            capacity_followed(fleet, bench.pacer, lambda count: 2 * count),
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(come_and_go())
            await bench.run()  # and the books are in order
        return bench

    bench = run_virtually(run())
    fleet = bench.fleet
    assert bench.ledger.num_trained == 2 * NUM_STEPS
    assert fleet.num_joined > 1
    assert fleet.num_left > 1
    assert fleet.num_rebuilt == 0
    assert bench.ledger.num_resumed > 0
    assert not {"failed", "preempted"} & set(bench.ledger.waste)
    assert max(most_in_flight) > 2, "the capacity follows"
