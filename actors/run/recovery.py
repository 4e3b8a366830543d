"""A policy that is lost, or rolled back, costs the steps since the last cut; the run goes on from there, in a new life.

`policy.max_restarts` counts in one process: it is about machines, and whoever gives the command again, a person or a
cluster that counts its own retries, says that they have another chance. What a run has rolled back is about what it
learns; it is in the journal from the moment at which it is decided (actors/health.py), and counts in every process that
goes on with it (Ledger.num_roll_backs).
"""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from actors.apart import apart
from actors.checkpoint.resume import Resume, find
from actors.checkpoint.store import CheckpointStore
from actors.deadline import aside, within
from actors.errors import PolicyLostError, RollBackError, RunError, StoppedError, first_cause
from actors.policy_group import PolicyGroup
from actors.recipe.schema import Recipe
from actors.run.folder import RunFolder
from actors.workers import Learners, Ranks, Workers

_GRACE_S = 120.0
"""A life that is told to end has so long, for a checkpoint that is being written, before it is told again."""

Lost = PolicyLostError | RollBackError


@dataclass(slots=True)
class Recovery:
    """Lives one life after the other, until one comes to its end."""

    recipe: Recipe
    folder: RunFolder
    say: Callable[[str], None]
    lived: Callable[[Resume | None], Coroutine[Any, Any, dict[str, Any]]]
    """One life to its end, from a cut or from the beginning; the summary. Raises what stopped it."""
    renewed: Callable[[], Awaitable[None]]
    """There is a new policy, and of the one before nothing is left; PolicyLostError when it does not start."""
    stopped: bool = False
    """Somebody has asked the run to end."""
    num_lost: int = 0

    async def live(self, resume: Resume | None) -> dict[str, Any]:
        """To the last step, and to the model that it leaves; the summary. Raises what stopped the run."""
        lost: Lost | None = None
        while True:
            try:
                # Apart: that a supervisor has failed is not lost when the policy is at the same moment.
                return await apart(self._next(lost, resume), _GRACE_S)
            except (BaseExceptionGroup, PolicyLostError) as errors:
                error = first_cause(errors)
                if not isinstance(error, Lost):
                    raise
            lost = error
            self._count(lost)

    async def _next(self, lost: Lost | None, resume: Resume | None) -> dict[str, Any]:
        if lost is not None:
            resume = await self._recovered(lost)
        return await self.lived(resume) | {"policy_restarts": self.num_lost}

    def _count(self, error: Lost) -> None:
        """RunError when a policy was lost too often; of rolling back the rule's own budget was asked (health.py)."""
        if isinstance(error, RollBackError):
            return
        self.num_lost += 1
        allowed = self.recipe.policy.max_restarts
        if self.num_lost > allowed:
            raise RunError(f"{error}; the policy was lost {self.num_lost} times, policy.max_restarts allows {allowed}")

    async def _recovered(self, error: Lost) -> Resume | None:
        """Where the run goes on from, with a new policy."""
        recipe, folder = self.recipe, self.folder
        store = CheckpointStore(folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.best)
        if self.stopped and store.versions():
            raise StoppedError(f"stopped, and the policy was lost meanwhile ({error}); the same command goes on")
        timeout_s = recipe.checkpoint.timeout_s
        try:
            finding = aside(find, store, folder.recipe, recipe, ())
            resume = await within(timeout_s, finding, "reading the newest checkpoint")
        except ValueError as damaged:
            raise RunError(f"{error}, and there is nothing to go on from: {damaged}") from error
        version = 0 if resume is None else resume.cut.version
        notes = () if resume is None else resume.notes
        for note in (f"warning: {error}; the policy is built again and goes on from step {version}", *notes):
            self.say(note)
        folder.rewind(recipe, version)
        await within(timeout_s, aside(store.discard_after, version), "removing what came later")
        await self.renewed()
        if self.stopped and resume is not None:  # it may have waited for engines that share its GPUs
            raise StoppedError(f"stopped while the policy was built again ({error}); the same command goes on")
        return resume


async def new_policy(ranks: Ranks) -> PolicyGroup:
    """New ranks; that they do not start is one loss more."""
    try:
        return await ranks.start()
    except RunError as error:
        raise PolicyLostError(str(error)) from error


async def new_learners(workers: Workers) -> Learners:
    """New ranks of policy and critic; likewise."""
    try:
        return await workers.learners()
    except BaseExceptionGroup as errors:
        error = first_cause(errors)
        if not isinstance(error, RunError):
            raise
        raise PolicyLostError(str(error)) from error
