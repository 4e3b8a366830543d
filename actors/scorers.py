"""A reward or reference worker that dies or stops answering is started again, and what it was asked is asked again.

Ray starts them again, on their bundle, under the same handle (`max_restarts`); the replicas repeat the calls that were
lost, which they may because scoring leaves no trace in a worker; and here somebody notices.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from actors.deadline import DeadlineError, within
from actors.deaths import is_death
from actors.errors import RunError, last_line
from actors.recipe.upkeep import LivenessConfig

_AGAIN_S = 0.5
_START_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Scorers:
    """All reward and reference workers of a run, by name."""

    workers: Mapping[str, ActorHandle]
    liveness: LivenessConfig
    say: Callable[[str], None]
    num_restarted: int = 0
    gone: set[str] = field(default_factory=set)
    """Those that are being started again."""
    there_since: float = 0.0
    """The time.monotonic() at which the last one was there again."""
    start_timeout_s: float = _START_TIMEOUT_S
    """Until one that was started again answers."""

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Workers that hang are killed, and so started again, while the context is open; RunError when one is gone."""
        async with asyncio.TaskGroup() as tasks:
            watches = [tasks.create_task(self._watch(name), name=f"watch {name}") for name in self.workers]
            yield
            for watch in watches:
                watch.cancel()

    async def _watch(self, name: str) -> None:
        worker = self.workers[name]
        process: int | None = None  # which one answered last
        gone_since = 0.0
        while True:
            await asyncio.sleep(self.liveness.every_s)
            try:
                answered = await within(self.liveness.timeout_s, _ping(worker), f"a sign of life of {name}")
            except (ActorUnavailableError, DeadlineError) as error:
                if name not in self.gone:
                    self.gone.add(name)
                    gone_since = time.monotonic()
                elif time.monotonic() - gone_since > self.start_timeout_s:
                    raise RunError(
                        f"{name} died or hung, and could not be started again in {self.start_timeout_s:g} s: "
                        f"{last_line(error)}"
                    ) from error
                if isinstance(error, DeadlineError):  # else Ray is starting it again
                    self.say(f"warning: {error}; it is killed and started again")
                    ray.kill(worker, no_restart=False)
                continue
            except RayError as error:
                raise RunError(f"{name} {self._ended(error)}: {last_line(error)}") from error
            if name in self.gone or process not in (None, answered):
                self.num_restarted += 1
                self.there_since = time.monotonic()
                self.say(f"warning: {name} had died and was started again")
                self.gone.discard(name)
            process = answered

    def _ended(self, error: RayError) -> str:
        """Why no further life is waited for."""
        most = self.liveness.max_restarts
        if not is_death(error):
            return "gives no sign of life"
        if isinstance(error, RayActorError):
            return f"died more than {most} times, which is all that liveness.max_restarts allows"
        return f"died, and Ray starts it no more (liveness.max_restarts allows {most} restarts)"


async def _ping(worker: ActorHandle) -> int:
    """The number of the process that answers."""
    process: int = await worker.ping.remote()
    return process


async def scored_by(worker: ray.actor.ActorHandle, *arguments: Any) -> Any:
    """The answer of a reward or reference worker; one that has died is being started again, and is asked again.

    Scoring leaves no trace in the worker, so it may be done twice. The caller keeps the deadline. One that is not
    started any more ends the run (`Scorers`), which knows its name; here it would be held against the group.
    """
    while True:
        try:
            return await worker.score.remote(*arguments)
        except RayError as error:
            if not is_death(error):
                raise
            await asyncio.sleep(_AGAIN_S)
