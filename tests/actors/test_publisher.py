"""Whatever happens to a replica in a publication, the others get the version whole, and it comes back with it."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import ray

from actors.fleet import Fleet, State
from actors.policy import CONTROL
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher, right_checksum
from actors.router import Router
from actors.turns import Turns
from sync.config import SyncConfig
from tests.actors.light import BUCKET_MB, SHAPES, Fault, LightPolicy, LightReplica
from tests.prove import ONLY_PROVE, PROVING

TIMEOUT_S = 4.0
SLACK_S = 15.0  # a machine under load
LAST = len(SHAPES) - 1


class Bench:
    """One policy rank and some replicas, each with the fault that its number has."""

    def __init__(
        self, faults: Mapping[int, Fault], num_replicas: int = 3, turns: Turns | None = None, **sync: Any
    ) -> None:
        actor: Any = ray.remote(num_cpus=0)(LightReplica)
        self.rank = ray.remote(num_cpus=0, concurrency_groups={CONTROL: 1})(LightPolicy).remote()
        self.handles: list[Any] = []

        def spawn(number: int, bundle: int) -> Any:
            self.handles.append(actor.remote(number, faults.get(number)))
            return self.handles[-1]

        self.said: list[str] = []
        self.router = Router(max_groups_per_replica=4, num_generations=2, max_completion_length=8)
        self.fleet = Fleet(
            spawn,
            num_replicas,
            self.router,
            start_timeout_s=60.0,
            max_rebuilds=len(faults) + 1,
            say=self.said.append,
            turns=turns,
        )
        policy = PolicyGroup((self.rank,), 8, 60.0)
        config = SyncConfig(bucket_mb=BUCKET_MB, timeout_s=TIMEOUT_S, full_every=3, checksum_every=1, **sync)
        self.publisher = Publisher(policy, self.fleet, 1, "float32", config, member_timeout_s=30.0)

    async def publish(self, version: int) -> float:
        """Seconds until the version is committed."""
        async with self.publisher.exclusive:
            if version:
                await self.rank.step.remote()
            started = time.monotonic()
            await self.publisher.publish(version)
        return time.monotonic() - started

    async def holds(self, number: int) -> tuple[int | None, bool]:
        held: tuple[int | None, bool] = await asyncio.wait_for(self.handles[number].holds.remote(), 20.0)
        return held

    async def serving(self, count: int) -> None:
        states = self.fleet._replicas
        ready = self.fleet.wait_for(lambda: sum(r.state is State.SERVING for r in states.values()) == count)
        await asyncio.wait_for(ready, 60.0)

    def close(self) -> None:
        for handle in (*self.handles, self.rank):
            ray.kill(handle)


@pytest.fixture
def close(local_ray: None) -> Iterator[list[Bench]]:
    benches: list[Bench] = []
    yield benches
    for bench in benches:
        bench.close()


FAULTS = [
    *(Fault("kill", at) for at in ("join", 0, LAST // 2, "swap")),
    *(Fault("stop", at) for at in (LAST // 2, "verify")),
    Fault("flip", LAST // 2),
    Fault("spoil", "swap"),
]
if PROVING:
    FAULTS += [Fault("kill", at) for at in ("announce", 1, LAST, "verify")]
    FAULTS += [Fault("stop", at) for at in (0, LAST, "swap")]


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.parametrize("fanout", [pytest.param(None, id="one group"), pytest.param(1, id="chain")])
def test_the_others_get_the_version_and_the_failed_one_comes_back(fanout: int | None, close: list[Bench]) -> None:
    """Replica 1, in a chain the first to pass on, fails at the first version, its successor at the next, and so on."""
    victims = [1, *range(3, len(FAULTS) + 2)]
    faults = {
        victim: Fault(fault.kind, fault.at, version)
        for version, (victim, fault) in enumerate(zip(victims, FAULTS, strict=True))
    }
    bench = Bench(faults, fanout=fanout)
    close.append(bench)
    asyncio.run(asyncio.wait_for(survive_all(bench, faults), 40.0 * len(faults)))


async def survive_all(bench: Bench, faults: Mapping[int, Fault]) -> None:
    await bench.fleet.start()
    await bench.publisher.connect()
    async with bench.fleet.supervised(), bench.publisher.admitting():
        for victim, fault in faults.items():
            await survive(bench, victim, fault)
    assert bench.fleet.num_rebuilt == len(faults)
    assert len(bench.said) == len(faults), "no one else was fenced"


async def survive(bench: Bench, victim: int, fault: Fault) -> None:
    """One fault in the publication of its version; the replica that comes for the victim holds the version too."""
    seconds = await bench.publish(fault.version)
    print(f"{fault.kind} at {fault.at}: {seconds:.1f} s")
    assert seconds < 2 * (TIMEOUT_S + 1.0) + SLACK_S, "one fault costs a deadline, and a probe"
    assert victim not in bench.router._routes.replicas, "no group goes to a fenced replica"
    for survivor in (0, 2):
        assert await bench.holds(survivor) == (fault.version, True), "no step is lost, and no byte"
    assert f"rollout replica {victim} is fenced" in bench.said[-1]
    await bench.serving(3)
    newcomer = max(victim, 2) + 1
    assert await bench.holds(newcomer) == (fault.version, True), "it has the committed version before it serves"


@pytest.mark.cluster
def test_a_slow_link_is_waited_for(close: list[Bench]) -> None:
    bench = Bench({1: Fault("slow", 2)}, delta=True)
    close.append(bench)

    async def main() -> None:
        await bench.fleet.start()
        await bench.publisher.connect()
        for version in range(5):
            await bench.publish(version)
            assert [await bench.holds(number) for number in range(3)] == [(version, True)] * 3
        assert bench.said == []

    asyncio.run(asyncio.wait_for(main(), 60.0))


@pytest.mark.cluster
def test_the_only_replica_is_rebuilt_while_the_publication_waits(close: list[Bench]) -> None:
    bench = Bench({}, num_replicas=1)
    close.append(bench)

    async def main() -> None:
        await bench.fleet.start()
        await bench.publisher.connect()
        async with bench.fleet.supervised(), bench.publisher.admitting():
            await bench.publish(0)
            ray.kill(bench.handles[0])
            await bench.publish(1)
            assert await bench.holds(1) == (1, True)

    asyncio.run(asyncio.wait_for(main(), 90.0))


@pytest.mark.cluster
def test_a_newcomer_is_compared_with_those_that_were_there(close: list[Bench]) -> None:
    """It is admitted alone, between two versions, and nobody else would tell that its weights are spoiled."""
    bench = Bench({1: Fault("kill", "swap"), 3: Fault("spoil", "swap")})
    close.append(bench)

    async def main() -> None:
        await bench.fleet.start()
        await bench.publisher.connect()
        async with bench.fleet.supervised(), bench.publisher.admitting():
            await bench.publish(0)
            await bench.publish(1)
            await bench.serving(3)
            assert [await bench.holds(number) for number in (0, 2, 4)] == [(1, True)] * 3
        assert "replica 3 is fenced and will be rebuilt: comparing checksums of version 1" in bench.said[-1]

    asyncio.run(asyncio.wait_for(main(), 90.0))


@pytest.mark.parametrize(
    ("answers", "known", "right"),
    [
        (["a", "a", "b"], None, "a"),
        (["a", "b"], None, None),
        (["a", "b", "c"], None, None),
        ([], None, None),
        (["b"], "a", "a"),
        (["b", "b", "a"], "a", "a"),
        ([], "a", "a"),
    ],
)
def test_the_right_checksum_was_found_before_or_is_that_of_most(
    answers: list[str], known: str | None, right: str | None
) -> None:
    assert right_checksum(answers, known) == right


@pytest.mark.cluster
def test_replicas_that_lie_with_the_policy_rest_while_it_steps_whatever_is_lost_meanwhile(close: list[Bench]) -> None:
    """One is killed at rest, and then the policy: the others have the next version, and nobody is left at rest."""
    bench = Bench({}, turns=Turns())
    close.append(bench)

    async def main() -> None:
        await bench.fleet.start()
        await bench.publisher.connect()
        async with bench.fleet.supervised():
            async with bench.publisher.admitting():
                await bench.publish(0)
                async with bench.publisher.exclusive, bench.publisher.resting():
                    assert [await bench.holds(number) for number in range(3)] == [(0, False)] * 3
                    ray.kill(bench.handles[1])
                    await bench.rank.step.remote()
                    await bench.publisher.publish(1)
                assert [await bench.holds(number) for number in (0, 2)] == [(1, True)] * 2
                await bench.serving(3)
                assert await bench.holds(3) == (1, True), "the newcomer was built after the step"
                with pytest.raises(ValueError, match="the policy is lost"):
                    async with bench.publisher.exclusive, bench.publisher.resting():
                        raise ValueError("the policy is lost")
            await bench.fleet.forget()
            async with bench.fleet.resting():  # in which a new one is built
                assert [await bench.holds(number) for number in (0, 2, 3)] == [(None, True)] * 3
            bench.publisher.committed = None  # another life
            await bench.publish(2)
            assert [await bench.holds(number) for number in (0, 2, 3)] == [(2, True)] * 3
        assert len(bench.said) == 1, "nobody was fenced but the one that was killed"

    asyncio.run(asyncio.wait_for(main(), 60.0))
