"""A real vLLM engine fails in a publication: the other has the version whole, and a new engine comes back with it."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from actors.fleet import Fleet, State
from actors.policy import policy_actor
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher
from actors.router import Router
from sync.config import SyncConfig
from tests.actors.faulty import FaultyRolloutActor
from tests.actors.light import Fault
from tests.actors.test_publication import (
    AGREEMENT,
    PROBE,
    NoReward,
    one_step,
    policy_settings,
    probe,
    rollout_settings,
)
from tests.prove import ONLY_PROVE

TIMEOUT_S = 6.0
SLACK_S = 15.0  # a machine under load
NUM_BUCKETS = 4
FAULTS = [
    *(Fault("kill", at) for at in ("announce", 0, 1, 2, NUM_BUCKETS - 1, "verify", "swap")),
    *(Fault("stop", at) for at in ("announce", 0, 1, NUM_BUCKETS - 1, "verify", "swap")),
    Fault("flip", 1),
]


class Bench:
    """One policy rank and two replicas, of which the second is told to fail."""

    def __init__(self, models: dict[str, Path]) -> None:
        self.rank = policy_actor().options(num_cpus=0.5).remote(0, policy_settings(models["untied"], 1))
        reward = ray.remote(num_cpus=0.1)(NoReward).remote()
        settings = rollout_settings(models["other"], "keep")
        actor: Any = ray.remote(num_cpus=1)(FaultyRolloutActor)
        self.handles: list[Any] = []
        self.said: list[str] = []

        def spawn(number: int, bundle: int) -> Any:
            self.handles.append(actor.remote(number, settings, [reward], []))
            return self.handles[-1]

        router = Router(max_groups_per_replica=64, num_generations=4, max_completion_length=160)
        self.fleet = Fleet(
            spawn, 2, router, start_timeout_s=300.0, max_rebuilds=len(FAULTS), say=self.said.append
        )  # fmt: skip
        self.group = PolicyGroup((self.rank,), 160, 120.0)
        config = SyncConfig(bucket_mb=0.1, timeout_s=TIMEOUT_S)
        self.publisher = Publisher(self.group, self.fleet, 1, "float32", config, member_timeout_s=300.0)

    async def difference(self, number: int) -> float:
        """Largest difference of a log-probability between the policy and a replica."""
        ours = (await self.rank.logprobs.remote([probe()]))[0]
        theirs = await self.handles[number].score_tokens.remote(PROBE)
        return float(np.abs(np.array(ours) - np.array(theirs)).max())

    async def publish(self, version: int) -> float:
        """Seconds of the publication; the policy takes a step before each but the first."""
        async with self.publisher.exclusive:
            if version:
                await self.group.step(*one_step(version - 1))
            started = time.monotonic()
            await self.publisher.publish(version)
        return time.monotonic() - started

    async def run(self) -> None:
        await asyncio.gather(self.fleet.start(), self.group.start(120.0))
        await self.publisher.connect()
        await self.publish(0)
        async with self.fleet.supervised(), self.publisher.admitting():
            for version, fault in enumerate(FAULTS, start=1):
                await self.survive(version, fault)

    async def survive(self, version: int, fault: Fault) -> None:
        victim = version  # 0 serves all along; 1 fails at version 1, and 2 comes for it, and so on
        await self.handles[victim].plan_fault.remote(Fault(fault.kind, fault.at, version))
        seconds = await self.publish(version)
        print(f"{fault.kind} at {fault.at}: {seconds:.1f} s; {self.said[-1]}")
        assert seconds < 2 * (TIMEOUT_S + 1.0) + SLACK_S, "one fault costs a deadline, and a probe"
        assert f"rollout replica {victim} is fenced" in self.said[-1]
        assert await self.difference(0) < AGREEMENT, "no step is lost"
        states = self.fleet._replicas
        ready = self.fleet.wait_for(lambda: sum(r.state is State.SERVING for r in states.values()) == 2)
        await asyncio.wait_for(ready, 200.0)
        assert await self.difference(victim + 1) < AGREEMENT, "it has the committed version before it serves"


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300 + 100 * len(FAULTS))
def test_an_engine_that_fails_is_rebuilt_with_the_committed_version(
    local_ray: None, tiny_models: dict[str, Path]
) -> None:
    bench = Bench(tiny_models)

    async def main() -> None:
        try:
            await bench.run()
        finally:
            await bench.fleet.close()

    try:
        asyncio.run(main())
    finally:
        ray.kill(bench.rank)
    assert bench.fleet.num_rebuilt == len(FAULTS)
    leaked = [process.pid for process in psutil.Process().children(recursive=True) if is_engine(process)]
    assert not leaked, "an engine outlived its actor"


def is_engine(process: psutil.Process) -> bool:
    try:
        return "EngineCore" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
