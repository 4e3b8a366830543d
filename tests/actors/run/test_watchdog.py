"""Real actors that are stopped, killed or busy: the run's last sentence names them, and stall.txt holds the stacks."""

import asyncio
import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.deadline import DeadlineError, within
from actors.errors import PolicyLostError
from actors.fleet import Fleet, State
from actors.pacer import AsyncPacer
from actors.policy import node_ip
from actors.publisher import Publisher
from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor
from actors.router import Router
from actors.run.sight import StallError
from actors.run.watchdog import Watchdog
from algorithms.pacing import Pacer
from algorithms.types import Prompt
from sync.config import SyncConfig
from tests.actors.fleets import fleet_of
from tests.actors.test_reward import group
from tests.prove import ONLY_PROVE

pytestmark = pytest.mark.cluster

REWARD = """
import time

def slow(completions, **kwargs):
    time.sleep(100)  # this line
    return [0.0] * len(completions)
"""


class ReplicaStandIn:
    """Has every group scored, and samples nothing."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    async def start(self) -> str:
        return node_ip()

    @ray.method(num_returns=2)
    async def fill(self, prompt: Prompt, attempt: int, partial: Any) -> tuple[Any, Any]:
        scored = await self.reward.score.remote(group(), ["a", "b"])
        return scored, scored


class PolicyStandIn:
    """A step that takes too long."""

    def step(self) -> None:
        time.sleep(100)  # that line


class Run:
    """One replica, one reward worker, and a policy that waits for their groups."""

    def __init__(self, folder: Path, then: Any = "exit", policies: tuple[Any, ...] = ()) -> None:
        (folder / "reward.py").write_text(REWARD)
        functions = (RewardConfig(function=f"{folder}/reward.py:slow"),)
        self.reward: Any = ray.remote(RewardActor).options(num_cpus=0.1, max_restarts=1).remote(functions, 200.0)
        self.replica: Any = ray.remote(ReplicaStandIn).options(num_cpus=0.1).remote(self.reward)
        self.policies = policies
        self.fleet: Fleet = fleet_of([self.replica])
        self.router: Router = self.fleet._router
        self.pacer = AsyncPacer(Pacer(groups_per_batch=2, max_staleness=0, num_batches=1), stall_timeout_s=3.0)
        self.left: list[int] = []
        self.said: list[str] = []
        self.watchdog = Watchdog(
            policies=policies,
            references=(),
            rewards=(self.reward,),
            fleet=self.fleet,
            router=self.router,
            pacer=self.pacer,
            publisher=Publisher(Any, self.fleet, 1, "float32", SyncConfig(), 1.0, committed=5),  # type: ignore[arg-type]
            path=folder / "stall.txt",
            then=then,
            say=self.said.append,
            leave=self.leave,
        )
        self.pacer.on_stall = self.watchdog.idle

    async def leave(self, version: int) -> int:
        self.left.append(version)
        return version

    async def begin(self) -> None:
        await self.fleet.start()
        self.fleet.serve(self.fleet.members)
        await within(60.0, self.reward.check.remote(), "loading the reward")
        await self.pacer.published(0)
        slots = self.pacer.slots()
        for _ in range(2):
            slot = await anext(slots)
            await self.router.dispatch(Prompt(slot.ordinal, 0, (1,), "question", {}), slot, None)
        await asyncio.sleep(1.0)  # until the reward function runs

    async def end(self) -> str:
        with pytest.raises(StallError) as caught:
            await within(120.0, self.pacer.take(), "the stall")
        return str(caught.value)

    def close(self) -> None:
        for actor in (self.reward, self.replica, *self.policies):
            ray.kill(actor)


def pid_of(actor: Any) -> int:
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    return pid


async def pid_again(actor: Any) -> int:
    """Of an actor that is being started again, which takes seconds on a busy machine."""
    async with asyncio.timeout(60.0):
        while True:
            with contextlib.suppress(ray.exceptions.ActorUnavailableError):
                return await asyncio.to_thread(pid_of, actor)
            await asyncio.sleep(0.2)


async def test_a_reward_function_that_hangs_is_named_with_its_line(local_ray: None, tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    try:
        told = await run.end()
    finally:
        run.close()
    assert re.match(r"no group finished for \d+ s while the policy waits: reward worker 0 \(pid ", told)
    assert f"is in slow, {tmp_path}/reward.py:5; the same command goes on from step 5; see {tmp_path}" in told
    assert run.left == [5], "a checkpoint is left"
    text = (tmp_path / "stall.txt").read_text()
    parts = "the policy waits for: groups", "the committed version is: 5", "== rollout replica 0", "== reward worker 0"
    for part in (*parts, "group 0 (attempt 0): on rollout replica 0 for", f"slow ({tmp_path}/reward.py:5)"):
        assert part in text
    assert "no stack" not in text


@pytest.mark.parametrize("who", ["reward", pytest.param("replica", marks=ONLY_PROVE)])
async def test_an_actor_that_is_stopped_is_named(who: str, local_ray: None, tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    pid = await asyncio.to_thread(pid_of, getattr(run, who))
    os.kill(pid, signal.SIGSTOP)
    try:
        told = await run.end()
    finally:
        os.kill(pid, signal.SIGKILL)
        run.close()
    name = {"reward": "reward worker 0", "replica": "rollout replica 0"}[who]
    assert f"{name} (pid {pid}, node {node_ip()}) is stopped (state T" in told
    text = (tmp_path / "stall.txt").read_text()
    assert f"{name}, node {node_ip()}: does not answer" in text
    assert text.count("Thread ") > 3, "of stopped processes too"


async def test_an_actor_that_is_dead_is_named(local_ray: None, tmp_path: Path) -> None:
    run = Run(tmp_path)
    await run.begin()
    ray.kill(run.reward)
    try:
        told = await run.end()
    finally:
        run.close()
    assert "reward worker 0" in told
    assert "is dead" in told


async def test_a_replica_that_is_the_suspect_is_fenced_and_the_run_waits_on(local_ray: None, tmp_path: Path) -> None:
    run = Run(tmp_path, then="retry")
    await run.begin()
    pid = await asyncio.to_thread(pid_of, run.replica)
    os.kill(pid, signal.SIGSTOP)
    waiting = asyncio.create_task(run.pacer.take())
    try:
        async with asyncio.timeout(60.0):
            while not run.said:  # noqa: ASYNC110  the watchdog tells nobody else
                await asyncio.sleep(0.1)
        assert not waiting.done(), "it waits for the groups of the next attempts"
    finally:
        waiting.cancel()
        os.kill(pid, signal.SIGKILL)
        run.close()
    assert run.fleet._replicas[0].state is State.FENCED
    assert f"rollout replica 0 (pid {pid}" in run.said[0]
    assert run.left == []


async def test_a_reward_worker_that_is_the_suspect_is_started_again(local_ray: None, tmp_path: Path) -> None:
    run = Run(tmp_path, then="retry")
    await run.begin()
    before = await asyncio.to_thread(pid_of, run.reward)
    waiting = asyncio.create_task(run.pacer.take())
    try:
        async with asyncio.timeout(60.0):
            while not run.said:  # noqa: ASYNC110  the watchdog tells nobody else
                await asyncio.sleep(0.1)
        assert await pid_again(run.reward) != before
        assert not waiting.done()
    finally:
        waiting.cancel()
        run.close()
    assert f"reward worker 0 (pid {before}" in run.said[0]


async def step(policy: Any, goes_on: bool) -> None:
    try:
        await within(3.0, policy.step.remote(), "the policy step at version 5")
    except DeadlineError as error:
        raise (PolicyLostError(str(error)) if goes_on else error) from error


@pytest.mark.parametrize("goes_on", [pytest.param(False, marks=ONLY_PROVE), True])
async def test_a_policy_that_is_late_is_named(goes_on: bool, local_ray: None, tmp_path: Path) -> None:
    """Whether its deadline ends the run, or the run goes on with another policy."""
    policy: Any = ray.remote(PolicyStandIn).options(num_cpus=0.1).remote()
    run = Run(tmp_path, policies=(policy,))
    await run.fleet.start()
    try:
        with pytest.raises(PolicyLostError if goes_on else StallError) as caught:
            async with run.watchdog.watching(), asyncio.TaskGroup() as tasks:
                tasks.create_task(step(policy, goes_on))
    finally:
        run.close()
    assert str(caught.value).startswith("the policy step at version 5 took longer than 3 s: policy rank 0 (pid ")
    assert f"does not answer: it is in PolicyStandIn.step, {__file__}:" in str(caught.value)
