"""A worker that Ray's memory monitor has killed is dead, whatever Ray calls it; who lives and raises is not."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.deaths import is_death, is_out_of_reach
from actors.errors import PolicyLostError, ReplicaDeadError, RunError, first_cause
from actors.policy_group import PolicyGroup
from actors.recipe.upkeep import LivenessConfig
from actors.scorers import scored_by
from tests.actors.test_errors import KILLED
from tests.virtual_time import run_virtually

NO_MEMORY = OutOfMemoryError(KILLED)
OUT_OF_REACH = ActorUnavailableError("the connection was reset", b"0" * 16)


def raised(cause: Exception) -> RayError:
    """What Ray makes of an error that a call has raised: a task error that is of the cause's type, too."""
    return RayTaskError("fill", f"Traceback\n{cause}", cause, "worker", 1, "127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY, RayActorError(), ActorDiedError(), ActorUnavailableError("it is restarting", b"0" * 16),
        WorkerCrashedError(), NodeDiedError("its node died"), LocalRayletDiedError(),
    ],
)  # fmt: skip
def test_whose_process_has_gone_is_dead(error: RayError) -> None:
    assert is_death(error)
    behind = raised(error)
    assert isinstance(behind, type(error))
    assert not is_death(behind), "it is somebody behind who was called, and he has told of it"


@pytest.mark.parametrize(
    "error",
    [
        raised(ValueError("no")), GetTimeoutError(), ObjectLostError("00" * 28, None, ""),
        ReplicaDeadError("its engine has died, the actor has not"), RunError("it is late"),
    ],
)  # fmt: skip
def test_who_raises_or_is_late_is_not_dead(error: Exception) -> None:
    assert not is_death(error)


def test_of_one_that_is_out_of_reach_it_is_not_known_yet() -> None:
    assert is_out_of_reach(OUT_OF_REACH)
    assert not any(is_out_of_reach(error) for error in (RayActorError(), NO_MEMORY, raised(OUT_OF_REACH)))


class Rank:
    """A policy rank whose calls fail as it is told, one after the other, and the last way for ever; None answers."""

    def __init__(self, *ends: Exception | None) -> None:
        self.ends = [*ends]
        self.num_calls = 0
        self.ping = self.scale_learning_rate = self

    def options(self, concurrency_group: str) -> "Rank":
        return self

    async def remote(self, *_: Any) -> None:
        self.num_calls += 1
        end = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        if end is not None:
            raise end


def policy(*ends: Exception | None) -> PolicyGroup:
    rank: Any = Rank(*ends)
    return PolicyGroup((rank,), 8, 5.0)


async def test_a_policy_rank_that_is_killed_for_memory_is_lost_and_no_end_of_the_run() -> None:
    with pytest.raises(PolicyLostError, match="policy scale_learning_rate: killed for want of memory on machine"):
        await policy(NO_MEMORY).scale_learning_rate(0.5)
    with pytest.raises(BaseExceptionGroup) as errors:
        async with policy(NO_MEMORY).watched(LivenessConfig(every_s=0.01)), asyncio.timeout(5.0):
            await asyncio.Event().wait()
    assert isinstance(first_cause(errors.value), PolicyLostError)


async def test_what_a_policy_rank_raises_of_somebody_behind_it_is_no_loss() -> None:
    with pytest.raises(RunError) as caught:
        await policy(raised(NO_MEMORY)).scale_learning_rate(0.5)
    assert not isinstance(caught.value, PolicyLostError)


async def test_a_call_of_a_policy_rank_that_is_out_of_reach_is_not_made_twice() -> None:
    """It may have been executed there: the ranks are at one place at the cut alone."""
    of = policy(OUT_OF_REACH, None)
    with pytest.raises(PolicyLostError, match="the connection was reset"):
        await of.scale_learning_rate(0.5)
    rank: Any = of.ranks[0]
    assert rank.num_calls == 1


async def test_a_policy_rank_that_answers_the_next_ping_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.deaths._AGAIN_S", 0.01)
    of = policy(None, OUT_OF_REACH, OUT_OF_REACH, None)
    rank: Any = of.ranks[0]
    async with of.watched(LivenessConfig(every_s=0.01)), asyncio.timeout(5.0):
        while rank.num_calls < 6:  # noqa: ASYNC110  nobody is told
            await asyncio.sleep(0.01)


def test_a_policy_rank_that_stays_out_of_reach_is_lost() -> None:
    async def run() -> None:
        async with policy(OUT_OF_REACH).watched(LivenessConfig()):
            await asyncio.sleep(3600.0)

    with pytest.raises(BaseExceptionGroup) as errors:
        run_virtually(run())
    error = first_cause(errors.value)
    assert isinstance(error, PolicyLostError)
    assert str(error) == "a sign of life of policy rank 0 took longer than 60 s"


class Scorer:
    """Fails as it is told, one call after the other, and then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = [*errors]
        self.score = self

    async def remote(self, value: int) -> int:
        if self.errors:
            raise self.errors.pop(0)
        return value + 1


async def test_a_scorer_that_is_killed_for_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.scorers._AGAIN_S", 0.01)
    scorer: Any = Scorer(NO_MEMORY, ActorUnavailableError("it is restarting", None), NO_MEMORY)
    assert await asyncio.wait_for(scored_by(scorer, 41), 5.0) == 42
    scorer = Scorer(raised(NO_MEMORY))
    with pytest.raises(OutOfMemoryError):
        await scored_by(scorer, 41)
