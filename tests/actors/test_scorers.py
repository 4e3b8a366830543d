"""A reward worker that dies or hangs is started again, and the replica that waits for it gets its answer."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from actors.errors import RunError, first_cause
from actors.recipe.upkeep import LivenessConfig
from actors.scorers import Scorers, scored_by

LIVENESS = LivenessConfig(every_s=0.2, timeout_s=8.0, max_restarts=2)


class Scorer:
    """Strikes its own process in its first life; then it scores."""

    def __init__(self, strike: int) -> None:
        self.strike = strike

    async def ping(self) -> int:
        return os.getpid()

    async def score(self, value: int) -> int:
        first_life = not ray.get_runtime_context().was_current_actor_reconstructed
        if self.strike and (first_life or value < 0):
            os.kill(os.getpid(), self.strike)
        return value + 1


@pytest.fixture
def workers(local_ray: None) -> Iterator[list[Any]]:
    spawned: list[Any] = []
    yield spawned
    for worker in spawned:
        ray.kill(worker)


def scorers(spawned: list[Any], strike: int) -> tuple[Scorers, Any, list[str]]:
    said: list[str] = []
    worker = ray.remote(num_cpus=0, max_restarts=LIVENESS.max_restarts)(Scorer).remote(strike)
    spawned.append(worker)
    return Scorers({"reward worker 0": worker}, LIVENESS, said.append), worker, said


async def asked(of: Scorers, worker: Any, value: int) -> int:
    """What the worker answers in the end, when it is known that it was started again."""
    async with of.watched(), asyncio.timeout(60.0):
        await asyncio.sleep(3 * LIVENESS.every_s)  # until it is known which process it was
        answer: int = await scored_by(worker, value)
        while of.num_restarted == 0:  # noqa: ASYNC110  nobody is told
            await asyncio.sleep(0.05)
        return answer


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("strike", "told"), [(signal.SIGKILL, "had died and was started again"), (signal.SIGSTOP, "a sign of life")]
)
async def test_a_worker_that_dies_or_hangs_answers_in_its_next_life(workers: list[Any], strike: int, told: str) -> None:
    of, worker, said = scorers(workers, strike)
    began = time.monotonic()
    assert await asked(of, worker, 41) == 42
    assert of.num_restarted == 1
    assert of.there_since > began
    assert told in said[0]


async def dying_again_and_again(of: Scorers, worker: Any) -> None:
    async with of.watched(), asyncio.timeout(60.0):
        with contextlib.suppress(RayActorError):
            await scored_by(worker, -1)
        await asyncio.Event().wait()


@pytest.mark.cluster
async def test_a_worker_that_dies_too_often_stops_the_run(workers: list[Any]) -> None:
    of, worker, _ = scorers(workers, signal.SIGKILL)
    with pytest.raises(BaseExceptionGroup) as errors:
        await dying_again_and_again(of, worker)
    error = first_cause(errors.value)
    assert isinstance(error, RunError)
    assert "reward worker 0 died more than 2 times" in str(error)
