"""That a scorer is being started again excuses that scorer, and nobody else who holds up the run."""

from pathlib import Path
from typing import Any

import pytest

from actors.run import watchdog
from actors.run.sight import Sight, StallError
from actors.run.suspect import REPLICA, REWARD, Pending, Worker
from actors.run.watchdog import Watchdog
from tests.actors.run.test_suspect import worker


class Nothing:
    """Of which the watchdog asks no more than this."""

    committed = None
    progress_at = 0.0


async def told(monkeypatch: pytest.MonkeyPatch, workers: list[Worker], starting: str = "") -> tuple[Any, list[str]]:
    """What ends the run while reward worker 1 is being started again, and what is said."""

    async def looked(dog: Watchdog, reason: str) -> Sight:
        return Sight(workers, [Pending(ordinal, 0, 0, 60.0) for ordinal in range(2)])

    monkeypatch.setattr(watchdog.Watchdog, "_look", looked)
    said: list[str] = []
    nothing: Any = Nothing()
    dog = Watchdog(
        policies=(), references=(), rewards=(), fleet=nothing, router=nothing, pacer=nothing, publisher=nothing,
        path=Path("stall.txt"), then="exit", say=said.append, starting=lambda: starting,
        restarting=lambda: {"reward worker 1"},
    )  # fmt: skip
    return await dog.idle("no group finished for 60 s"), said


async def test_the_run_waits_for_a_scorer_that_is_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    error, said = await told(monkeypatch, [worker(REPLICA), worker(REWARD, 0), worker(REWARD, 1, answers=False)])
    assert error is None
    assert "reward worker 1 " in said[0]
    assert said[0].endswith("it is being started again, and the run waits for that")


@pytest.mark.parametrize("bad", [worker(REPLICA, state="T"), worker(REWARD, 0, state="T")])
async def test_it_does_not_wait_while_another_is_to_blame(monkeypatch: pytest.MonkeyPatch, bad: Worker) -> None:
    others = [one for one in (worker(REPLICA), worker(REWARD, 0)) if one.name != bad.name]
    error, said = await told(monkeypatch, [bad, *others, worker(REWARD, 1, answers=False)])
    assert isinstance(error, StallError)
    assert bad.name in str(error)
    assert said == []


async def test_nobody_is_looked_at_while_no_replica_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    error, said = await told(monkeypatch, [worker(REPLICA, state="T")], starting="no rollout replica serves")
    assert error is None
    assert "no rollout replica serves, and it waits for that" in said[0]
