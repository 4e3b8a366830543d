"""A scorer that is being started again is waited for, whether its pings fail or hang, and never without end."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError

from actors.errors import RunError, first_cause
from actors.recipe.upkeep import LivenessConfig
from actors.scorers import Scorers
from tests.actors.test_errors import KILLED

LIVENESS = LivenessConfig(every_s=0.1, timeout_s=1.0, max_restarts=2)
Ping = Callable[[], Coroutine[Any, Any, int]]


class Worker:
    """Answers as it is told, one ping after the other; the last of them for ever."""

    def __init__(self, *pings: Ping) -> None:
        self.pings = [*pings]
        self.ping = self

    async def remote(self) -> int:
        return await (self.pings.pop(0) if len(self.pings) > 1 else self.pings[0])()


async def answers() -> int:
    return os.getpid()


async def hangs() -> int:
    await asyncio.Event().wait()
    raise AssertionError


async def is_not_there() -> int:
    raise ActorUnavailableError("it is restarting", b"0" * 16)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", lambda worker, no_restart: killed.append(worker))
    return killed


def scorers(worker: Any, start_timeout_s: float) -> tuple[Scorers, list[str]]:
    said: list[str] = []
    return Scorers({"reward worker 0": worker}, LIVENESS, said.append, start_timeout_s=start_timeout_s), said


@pytest.mark.parametrize("silence", [hangs, is_not_there])
async def test_one_that_does_not_come_back_stops_the_run(killed: list[Any], silence: Ping) -> None:
    of, _ = scorers(Worker(answers, silence), start_timeout_s=0.3)
    with pytest.raises(BaseExceptionGroup) as errors:
        async with of.watched(), asyncio.timeout(20.0):
            await asyncio.Event().wait()
    error = first_cause(errors.value)
    assert isinstance(error, RunError)
    assert "reward worker 0 died or hung, and could not be started again in 0.3 s" in str(error)
    assert bool(killed) == (silence is hangs)


async def test_one_that_hangs_once_is_started_again_and_the_run_goes_on(killed: list[Any]) -> None:
    of, said = scorers(Worker(answers, hangs, is_not_there, answers), start_timeout_s=20.0)
    async with of.watched(), asyncio.timeout(20.0):
        while of.num_restarted == 0:  # noqa: ASYNC110  nobody is told
            await asyncio.sleep(0.01)
    assert len(killed) == 1
    assert of.gone == set()
    assert [line.split("; ")[-1] for line in said] == [
        "it is killed and started again", "warning: reward worker 0 had died and was started again"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OutOfMemoryError(KILLED), "reward worker 0 died, and Ray starts it no more (liveness.max_restarts allows 2 "
         "restarts): killed for want of memory on machine 10.0.0.7"),
        (RayActorError(), "reward worker 0 died more than 2 times, which is all that liveness.max_restarts allows: "),
        (RayTaskError("ping", "Traceback\nOSError: no", OSError("no"), "worker", 1, "127.0.0.1"),
         "reward worker 0 gives no sign of life: "),
    ],
)  # fmt: skip
async def test_one_that_is_dead_for_good_stops_the_run_with_its_name(error: Exception, told: str) -> None:
    async def fails() -> int:
        raise error

    of, _ = scorers(Worker(answers, fails), start_timeout_s=20.0)
    with pytest.raises(BaseExceptionGroup) as errors:
        async with of.watched(), asyncio.timeout(20.0):
            await asyncio.Event().wait()
    first = first_cause(errors.value)
    assert isinstance(first, RunError)
    assert str(first).startswith(told)
