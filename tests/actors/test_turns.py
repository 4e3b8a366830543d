"""Engines that share the policy's GPUs are built while it does not compute, and rest while it does."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from actors.critic_group import CriticGroup
from actors.deadline import Clock, DeadlineError
from actors.fleet import Fleet, State
from actors.pacer import AsyncPacer
from actors.router import Router
from actors.turns import Turns, turns_followed
from algorithms.config import GrpoConfig
from algorithms.pacing import Pacer
from tests.actors.groups import ready
from tests.virtual_time import run_virtually


class Engine:
    """The handle of a replica: what it was asked for, and how long it takes."""

    def __init__(self, number: int, events: list[str], takes_s: dict[str, float]) -> None:
        self.number, self.events, self.takes_s = number, events, takes_s
        for method in ("start", "rest", "close", "forget"):
            setattr(self, method, SimpleNamespace(remote=self._call(method)))

    def _call(self, method: str) -> Callable[[], Any]:
        async def call() -> str:
            self.events.append(f"{method} {self.number}")
            await asyncio.sleep(self.takes_s.get(method, 0.0))
            self.events.append(f"{method} {self.number} done")
            return "127.0.0.1"

        return call


def fleet_of(events: list[str], shares: bool = True, **takes_s: float) -> Fleet:
    router = Router(max_groups_per_replica=4, num_generations=2, max_completion_length=8)
    handles: list[Any] = []

    def spawn(number: int, bundle: int) -> Any:
        handles.append(Engine(number, events, takes_s))
        return handles[-1]

    turns = Turns() if shares else None
    return Fleet(spawn, 2, router, start_timeout_s=60.0, max_rebuilds=3, say=events.append, turns=turns)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)


def test_replicas_rest_while_the_policy_computes_and_groups_have_that_time_more() -> None:
    events: list[str] = []

    async def run() -> None:
        fleet = fleet_of(events)
        await fleet.start()
        fleet.serve(fleet.members)
        group = asyncio.create_task(fleet.clock.within(3.0, asyncio.sleep(12.0), "a group"))
        await asyncio.sleep(1.0)
        async with fleet.resting():
            assert events[-4:] == ["rest 0", "rest 1", "rest 0 done", "rest 1 done"]
            await asyncio.sleep(10.0)
        await group  # 12 s of which 2 count
        assert fleet.num_serving == 2, "no group is taken from them"
        with pytest.raises(DeadlineError, match="a group took longer than 3 s"):
            await fleet.clock.within(3.0, asyncio.sleep(12.0), "a group")

    run_virtually(run())


def test_an_engine_is_built_before_or_after_a_step_and_the_step_waits_for_it() -> None:
    """Two are built side by side; one that dies is built again only when the policy has computed."""
    events: list[str] = []

    async def run() -> None:
        fleet = fleet_of(events, start=20.0)
        async with fleet.supervised():
            starting = asyncio.create_task(fleet.start())
            await asyncio.sleep(1.0)
            async with fleet.resting():
                assert starting.done()
                events.append("step")
                fleet.fence(1, "it died")
                await asyncio.sleep(5.0)
                events.append("stepped")
                fleet.computed()  # the version is published inside
                await asyncio.sleep(1.0)
                assert events[-1] == "start 2"
            async with fleet.resting():
                assert events.count("start 2 done") == 1
                assert fleet.members[-1].number == 2
                assert "rest 2 done" in events

    run_virtually(run())
    assert events.index("start 1") < events.index("start 0 done"), "side by side"
    step, stepped = events.index("step"), events.index("stepped")
    assert not any(event.startswith("start") for event in events[step:stepped])


def test_a_replica_that_does_not_come_to_rest_is_ended_before_the_policy_computes() -> None:
    events: list[str] = []

    async def run() -> None:
        fleet = fleet_of(events, rest=50.0, close=2.0)
        async with fleet.supervised():
            await fleet.start()
            async with fleet.resting(timeout_s=5.0):
                assert {replica.state for replica in fleet._replicas.values()} <= {State.FENCED, State.STARTING}
                assert {"close 0 done", "close 1 done"} <= {*events}
                assert "start 2" not in events

    run_virtually(run())


def test_a_step_that_fails_gives_its_turn_back() -> None:
    events: list[str] = []

    async def run() -> None:
        fleet = fleet_of(events)
        await fleet.start()
        with pytest.raises(ValueError, match="the policy is lost"):
            async with fleet.resting():
                raise ValueError("the policy is lost")
        await fleet.forget()
        async with fleet.resting():
            events.append("a new policy")
        assert events[-1] == "a new policy"
        await fleet.join(2)

    run_virtually(run())


def test_a_critic_has_turns_beside_the_policys_and_engines_are_built_when_both_have_computed() -> None:
    events: list[str] = []

    class Ranks:
        timeout_s = 60.0

        async def step(self, batch: Any, scored: Any) -> Any:
            events.append("the critic steps")
            await asyncio.sleep(10.0)
            events.append("the critic has stepped")
            return SimpleNamespace(metrics={"loss": 0.5})

    async def run() -> None:
        fleet = fleet_of(events, start=20.0)
        ranks: Any = Ranks()
        lesson: Any = SimpleNamespace(batch=None, seconds=0.1)
        critic = CriticGroup(ranks, GrpoConfig(), 100, 0, fleet.computing)
        async with fleet.supervised():
            await fleet.start()
            fleet.fence(1, "it died")
            await asyncio.sleep(1.0)
            assert events[-1] == "start 2"
            async with asyncio.timeout(40.0), fleet.resting():
                assert "start 2 done" in events, "the policy waits for an engine"
                learning = asyncio.create_task(critic.train_step(lesson, []))
                await asyncio.sleep(1.0)
                fleet.fence(0, "it died")
                fleet.computed()
                await asyncio.sleep(1.0)
                assert events[-1] == "close 0 done", "the critic is not done"
                await learning
                await asyncio.sleep(1.0)
                assert events[-1] == "start 3"

    run_virtually(run())


async def test_no_batch_is_given_out_while_an_engine_is_built_and_whoever_stops_the_run_is_heard() -> None:
    pacer = AsyncPacer(Pacer(groups_per_batch=1, max_staleness=1, num_batches=4), stall_timeout_s=0.2)
    await pacer.published(0)
    slots = pacer.slots()
    for _ in range(2):
        slot = await anext(slots)
        await pacer.finished(slot, ready(slot, 0))
    turns = Turns()
    async with turns_followed(turns, pacer):
        async with turns.building():
            taking = asyncio.create_task(pacer.take())
            await asyncio.sleep(0.5)
            assert not taking.done(), "and that took longer than a stall may"
            assert pacer.facts()["the policy waits for"] == "engine"
        taken = await asyncio.wait_for(taking, 5.0)
        assert taken is not None
        assert pacer.waits["policy/engine"] >= 0.4
        async with turns.building():
            taking = asyncio.create_task(pacer.take())
            await asyncio.sleep(0.01)
            await pacer.stop()
            assert await asyncio.wait_for(taking, 5.0) is None


def test_who_has_gpus_of_his_own_does_not_rest() -> None:
    events: list[str] = []

    async def run() -> None:
        fleet = fleet_of(events, shares=False)
        await fleet.start()
        async with fleet.resting():
            await fleet.join(2)
        fleet.computed()
        assert not any(event.startswith("rest") for event in events)

    run_virtually(run())


def test_a_clock_that_stands_still_holds_old_and_new_deadlines() -> None:
    async def run() -> None:
        clock = Clock()
        clock.start()
        old = asyncio.create_task(clock.within(2.0, asyncio.sleep(60.0), "old"))
        done = asyncio.create_task(clock.within(2.0, asyncio.sleep(5.0), "done meanwhile"))
        await asyncio.sleep(1.0)
        clock.stop()
        clock.stop()
        new = asyncio.create_task(clock.within(2.0, asyncio.sleep(60.0), "new"))
        await asyncio.sleep(20.0)
        assert done.done()
        assert not old.done()
        assert not new.done()
        clock.start()
        await asyncio.sleep(1.5)
        assert old.done()
        assert not new.done()
        await asyncio.sleep(1.0)
        for task, what in ((old, "old"), (new, "new")):
            with pytest.raises(DeadlineError, match=f"{what} took longer than 2 s"):
                await task
        await done
        stopped = asyncio.create_task(clock.within(2.0, asyncio.sleep(60.0), "stopped"))
        await asyncio.sleep(0.1)
        clock.stop()
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        clock.start()

    run_virtually(run())
