"""A policy that is lost costs the steps since the cut; what ends the run ends it, also when both come at one moment."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint.resume import Resume
from actors.errors import PolicyLostError, RollBackError, RunError, StoppedError, first_cause
from actors.fleet import Fleet
from actors.recipe.file import load_recipe
from actors.run.folder import RunFolder
from actors.run.recovery import Recovery
from tests.actors.fleets import fleet_of

LOST = PolicyLostError("policy rank 0 died")
GONE_WRONG = RollBackError("entropy was 0")
Life = Callable[[], Coroutine[Any, Any, dict[str, Any]]]


class Lived:
    """Each life raises what it is told, and the last one comes to its end."""

    def __init__(self, folder: Path, *ends: Exception | Life, policies: tuple[Exception, ...] = ()) -> None:
        self.ends, self.policies = [*ends], [*policies]
        self.num_lives = 0
        self.said: list[str] = []
        recipe = load_recipe("recipes/demo.yaml", ["policy.max_restarts=2"])
        run = RunFolder(folder / "run")
        run.create(recipe, overwrite=False)
        self.recovery = Recovery(recipe, run, self.said.append, self.life, self.policy)

    async def life(self, resume: Resume | None) -> dict[str, Any]:
        self.num_lives += 1
        end = self.ends.pop(0) if self.ends else None
        if isinstance(end, Exception):
            raise BaseExceptionGroup("a task group of the life", [end])
        return {"steps": 9} if end is None else await end()

    async def policy(self) -> None:
        if self.policies:
            raise self.policies.pop(0)


async def test_a_lost_policy_is_built_again_within_its_budget(tmp_path: Path) -> None:
    lived = Lived(tmp_path, LOST, LOST)
    assert await lived.recovery.live(None) == {"steps": 9, "policy_restarts": 2}
    assert lived.num_lives == 3
    assert "policy rank 0 died; the policy is built again and goes on from step 0" in lived.said[0]


async def test_one_that_is_lost_too_often_ends_the_run(tmp_path: Path) -> None:
    lived = Lived(tmp_path, LOST, LOST, LOST, LOST)
    with pytest.raises(RunError, match=r"died; the policy was lost 3 times, policy.max_restarts allows 2"):
        await lived.recovery.live(None)
    assert lived.num_lives == 3


async def test_one_that_does_not_start_again_is_one_loss_more(tmp_path: Path) -> None:
    lived = Lived(tmp_path, LOST, policies=(LOST,))
    assert (await lived.recovery.live(None))["policy_restarts"] == 2
    assert lived.num_lives == 2


async def test_a_roll_back_costs_nothing_of_what_is_allowed_for_machines(tmp_path: Path) -> None:
    lived = Lived(tmp_path, GONE_WRONG, LOST, policies=(LOST,))
    assert (await lived.recovery.live(None))["policy_restarts"] == 2
    assert lived.num_lives == 3


async def test_what_is_no_loss_ends_the_run_at_once(tmp_path: Path) -> None:
    lived = Lived(tmp_path, RunError("rewards failed"))
    with pytest.raises(BaseExceptionGroup) as caught:
        await lived.recovery.live(None)
    assert str(first_cause(caught.value)) == "rewards failed"
    assert lived.num_lives == 1


async def test_a_run_that_is_asked_to_stop_does_not_begin_another_life(tmp_path: Path) -> None:
    lived = Lived(tmp_path, LOST)
    lived.recovery.stopped = True
    (lived.recovery.folder.checkpoints / "version-00000003").mkdir(parents=True)
    with pytest.raises(StoppedError, match="stopped, and the policy was lost meanwhile"):
        await lived.recovery.live(None)
    assert lived.num_lives == 1


class Engine:
    """The handle of a replica that starts at once."""

    def __init__(self) -> None:
        self.start = self.close = self

    async def remote(self) -> str:
        return "127.0.0.1"


async def test_a_supervisor_that_fails_while_a_life_is_lost_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The life's task group takes the cancellation for its own: only the lost policy would be seen."""
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    fleet: Fleet = fleet_of([Engine()])
    await fleet.start()

    async def watch() -> None:
        await asyncio.sleep(0.01)
        raise LOST

    async def steps() -> None:
        try:
            await asyncio.sleep(3600.0)
        finally:
            fleet.fence(0, "the same machine is gone")
            await asyncio.sleep(0.05)

    async def doomed() -> dict[str, Any]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(steps())
            tasks.create_task(watch())
        raise AssertionError("it does not come so far")

    async def unsupervised() -> dict[str, Any]:
        await asyncio.sleep(3600.0)  # it would wait for the replica without end
        return {}

    lived = Lived(tmp_path, doomed, unsupervised)

    async def run() -> None:
        async with fleet.supervised():
            await lived.recovery.live(None)

    task = asyncio.create_task(run())
    done, _ = await asyncio.wait({task}, timeout=5.0)
    task.cancel()
    assert done, "another life was begun, and lives on without a supervisor"
    error = task.exception()
    assert error is not None
    assert "rollout.max_rebuilds allows 0" in str(first_cause(error))
    assert lived.num_lives == 1
