"""What the cluster offers becomes replicas that join and leave; the fleet is real, its engines start at once."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.elastic import Elastic, capacity_followed
from actors.errors import RunError, first_cause
from actors.fleet import Fleet
from actors.pacer import AsyncPacer
from actors.router import Router
from actors.scaling import ScaleFiles
from algorithms.pacing import Pacer
from placement.config import RolloutPoolConfig
from placement.elastic import Place, Seat
from tests.actors.run.test_recovery import Engine


class Offer:
    """Stands in for the seats of a cluster: as many are granted as there is room."""

    def __init__(self, room: int, seats: int) -> None:
        self.room = room
        self.numbers = list(range(seats))
        self.next_number = seats
        self.places: dict[int, Place] = {}
        self.drain_by: dict[int, float] = {}
        self.condemned: list[int] = []

    def ask(self) -> int:
        self.numbers.append(self.next_number)
        self.next_number += 1
        return self.numbers[-1]

    def give_back(self, number: int) -> None:
        self.numbers.remove(number)

    def condemn(self, number: int) -> None:
        self.condemned.append(number)
        self.places[number] = Place.GONE

    def look(self) -> list[Seat]:
        granted = [number for number in self.numbers if number not in self.places][: self.room]
        places = {number: Place.GRANTED if number in granted else Place.ASKED for number in self.numbers}
        places |= {number: place for number, place in self.places.items() if number in places}
        return [Seat(number, place, node=f"n{number}") for number, place in places.items()]


class Bench:
    """A fleet of engines that start at once, on the seats of an offer."""

    def __init__(self, folder: Path, room: int, begin: int = 1, **pool: int) -> None:
        self.offer = Offer(room, begin)
        seats: Any = self.offer
        self.said: list[str] = []
        self.router = Router(max_groups_per_replica=4, num_generations=2, max_completion_length=8)

        def spawn(number: int, bundle: int) -> Any:
            return Engine()

        self.fleet = Fleet(spawn, begin, self.router, start_timeout_s=5.0, max_rebuilds=0, say=self.said.append)
        config = RolloutPoolConfig(**{"num_workers": begin, **pool})
        self.files = ScaleFiles(folder)
        self.elastic = Elastic(config, seats, self.fleet, self.files, 0.1, 0.3, self.said.append)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        await self.fleet.start()
        self.fleet.serve(self.fleet.members)
        async with self.fleet.supervised(), self.elastic.supervised():
            yield

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(5.0):
            while not reached():
                self.fleet.serve(self.fleet.members)  # a publication
                await asyncio.sleep(0.01)

    def bundles(self) -> list[int]:
        return sorted(replica.bundle for replica in self.fleet.members)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.elastic._EVERY_S", 0.01)
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)


async def test_replicas_join_as_there_is_room_and_leave_when_fewer_are_wanted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room=2, begin=1, max_workers=3)
    async with bench.running():
        asking = asyncio.create_task(asyncio.to_thread(bench.files.ask, 3, 5.0))
        await bench.until(lambda: bench.bundles() == [0, 1])
        assert await asking is None
        assert len(bench.offer.numbers) == 3, "the third stays asked for"
        bench.offer.room = 3
        await bench.until(lambda: bench.bundles() == [0, 1, 2])
        assert await asyncio.to_thread(bench.files.ask, 4, 5.0) == (
            "4 is not within pools.rollout.min_workers=1 and max_workers=3"
        )
        assert await asyncio.to_thread(bench.files.ask, 1, 5.0) is None
        await bench.until(lambda: bench.offer.numbers == [0])
        assert bench.bundles() == [0]
    assert (bench.fleet.num_joined, bench.fleet.num_left, bench.fleet.num_rebuilt) == (2, 2, 0)


async def test_a_drained_machine_loses_its_replica_and_another_gets_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room=2, begin=2, min_workers=1)
    async with bench.running():
        bench.offer.drain_by[0] = time.time() + 60.0
        bench.offer.places[0] = Place.DRAINING
        await bench.until(lambda: bench.bundles() == [1, 2])
        await bench.until(lambda: bench.offer.numbers == [1, 2])
    assert "rollout replica 0 leaves: its machine is being drained" in bench.said


async def test_who_was_on_a_machine_that_is_gone_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """max_rebuilds is 0: a counted failure would end the run."""
    monkeypatch.setattr("actors.elastic._answers", lambda seats, number: False)
    bench = Bench(tmp_path, room=2, begin=2, min_workers=1)
    async with bench.running():
        bench.fleet.fence(1, "it died")
        await bench.until(lambda: bench.bundles() == [0, 2])
        assert bench.offer.condemned == [1]
        assert 1 not in bench.offer.numbers


async def test_who_fails_on_a_machine_that_is_there_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.elastic._answers", lambda seats, number: True)
    bench = Bench(tmp_path, room=2, begin=2, min_workers=1)

    async def run() -> None:
        async with bench.running():
            bench.fleet.fence(1, "it died")
            await bench.until(lambda: False)

    with pytest.raises(BaseExceptionGroup) as errors:
        await run()
    assert "rollout.max_rebuilds allows 0 replacements" in str(first_cause(errors.value))


async def test_a_pool_that_stays_too_small_ends_the_run_and_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room=2, begin=2, min_workers=2, max_workers=3)

    async def run() -> None:
        async with bench.running():
            bench.offer.room = 0
            bench.offer.places = {0: Place.GONE, 1: Place.GONE}
            await bench.until(lambda: bool(bench.elastic.waits_for))
            assert bench.elastic.waits_for.startswith("fewer than pools.rollout.min_workers=2")
            await bench.until(lambda: False)

    with pytest.raises(BaseExceptionGroup) as errors:
        await run()
    error = first_cause(errors.value)
    assert isinstance(error, RunError)
    assert str(error).startswith("pool 'rollout': 0 of at least 2 replicas (pools.rollout.min_workers) have had a mach")


async def test_a_pool_that_was_too_small_for_a_while_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room=1, begin=1, max_workers=2)
    async with bench.running():
        bench.offer.room = 0
        bench.offer.places = {0: Place.GONE}
        await bench.until(lambda: bool(bench.elastic.waits_for))
        bench.offer.room = 1
        await bench.until(lambda: bench.bundles() == [1])
        assert bench.elastic.waits_for == ""
        await asyncio.sleep(0.4)


async def test_as_many_groups_are_in_flight_as_the_serving_replicas_may_hold(tmp_path: Path) -> None:
    bench = Bench(tmp_path, room=3, begin=1, max_workers=3)
    pacer = Pacer(groups_per_batch=4, max_staleness=3, num_batches=9, max_in_flight=4)
    async with (
        bench.running(),
        capacity_followed(bench.fleet, AsyncPacer(pacer, 60.0), lambda count: min(10, 4 * count)),
    ):
        await bench.until(lambda: pacer.max_in_flight == 4)
        assert await asyncio.to_thread(bench.files.ask, 3, 5.0) is None
        await bench.until(lambda: pacer.max_in_flight == 10)
        assert await asyncio.to_thread(bench.files.ask, 1, 5.0) is None
        await bench.until(lambda: pacer.max_in_flight == 4)
