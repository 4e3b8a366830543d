"""A life that is lost costs the steps since the cut; what ends the run ends it, also when both come at one moment."""

import asyncio
from typing import Any

import pytest

from actors.checkpoint.resume import Resume
from actors.errors import PolicyLostError, RunError, first_cause
from actors.fleet import Fleet
from actors.recipe.file import load_recipe
from actors.run.grpo import Lives
from actors.run.life import Run
from tests.actors.fleets import fleet_of


class Engine:
    """The handle of a replica that starts at once."""

    def __init__(self) -> None:
        self.start = self.close = self

    async def remote(self) -> str:
        return "127.0.0.1"


class Doomed(Lives):
    """The first life loses its policy, and while it ends a replica fails that may not be rebuilt."""

    num_begun = 0

    async def _lived(self, resume: Resume | None) -> dict[str, object]:
        type(self).num_begun += 1
        if self.num_begun > 1:
            await asyncio.sleep(3600.0)  # nobody supervises it: it would wait for the replica without end
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._steps())
            tasks.create_task(self._watch())
        raise AssertionError("it does not come so far")

    async def _watch(self) -> None:
        await asyncio.sleep(0.01)
        raise PolicyLostError("policy rank 0 died")

    async def _steps(self) -> None:
        try:
            await asyncio.sleep(3600.0)
        finally:
            fleet: Fleet = self.run.workers.fleet
            fleet.fence(0, "the same machine is gone")
            await asyncio.sleep(0.05)

    async def _recovered(self, error: Any) -> Resume | None:
        return None


async def test_a_supervisor_that_fails_while_a_life_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The life's task group takes the cancellation for its own: only the lost policy would be seen."""
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    fleet = fleet_of([Engine()])
    await fleet.start()
    workers: Any = type("Workers", (), {"fleet": fleet})()
    unused: Any = None
    recipe: Any = load_recipe("recipes/demo.yaml")
    Doomed.num_begun = 0
    lives = Doomed(Run(recipe, unused, unused, unused, unused, unused, unused, workers), unused)

    async def run() -> None:
        async with fleet.supervised():
            await lives.live(None)

    task = asyncio.create_task(run())
    done, _ = await asyncio.wait({task}, timeout=5.0)
    task.cancel()
    assert done, "another life was begun, and lives on without a supervisor"
    error = task.exception()
    assert isinstance(error, BaseExceptionGroup)
    assert isinstance(first_cause(error), RunError)
    assert "rollout.max_rebuilds allows 0" in str(first_cause(error))
    assert Doomed.num_begun == 1
