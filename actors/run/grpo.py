"""One GRPO run from its recipe to its run folder: start the workers, live until the last step, write the summary."""

import asyncio
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from actors.checkpoint.resume import Resume, find
from actors.checkpoint.store import CheckpointStore
from actors.data.prompts import PromptStream
from actors.deadline import aside, within
from actors.errors import PolicyLostError, RollBackError, RunError, StoppedError, first_cause
from actors.policy_group import PolicyGroup
from actors.recipe.schema import GrpoRecipe
from actors.router import Router
from actors.run.folder import RunFolder
from actors.run.life import Life, Run, begin
from actors.run.machine import machine_watched
from actors.run.plot import plot_run
from actors.run.progress import RunProgress
from actors.run.signals import on_signal
from actors.run.tracker import Tracker
from actors.settings import ModelSource
from actors.workers import Roles, grpo_workers
from placement.groups import ReservedPools


async def run_grpo(
    recipe: GrpoRecipe,
    model: ModelSource,
    prompts: PromptStream,
    tokenizer: PreTrainedTokenizerBase,
    pools: ReservedPools,
    folder: RunFolder,
    progress: RunProgress,
    resume: Resume | None = None,
    roles: Roles | None = None,
) -> None:
    """Train, from the beginning or from a cut; raises what stopped the run, after the workers are gone."""
    progress.say("starting the policy, the rollout replicas and the reward workers")
    config = recipe.model_dump(mode="json")
    router = Router(
        max_groups_per_replica=recipe.max_groups_per_replica,
        num_generations=recipe.algorithm.num_generations,
        max_completion_length=recipe.generation.max_completion_length,
    )
    starting = grpo_workers(recipe, model, pools, folder.path, router, progress.say, roles or Roles())
    async with machine_watched(recipe.liveness), starting as started:
        workers, policy = started
        with Tracker(recipe.logging.wandb_project, recipe.name, folder.path, config) as tracker:
            lives = Lives(Run(recipe, prompts, tokenizer, folder, progress, tracker, router, workers), policy)
            async with workers.fleet.supervised(recipe.liveness), workers.scorers.watched():
                with on_signal(lives.stop, progress.say):
                    summary = await lives.live(resume)
    tokenizer.save_pretrained(folder.model)
    plot_run(folder.read_metrics(), recipe.staleness.max_staleness, folder.plot)
    folder.write_summary(summary)


@dataclass(slots=True)
class Lives:
    """A policy that is lost, or rolled back, costs the steps since the last cut; the engines, and the run, go on."""

    run: Run
    policy: PolicyGroup
    num_lost: int = 0
    num_roll_backs: int = 0
    checkpoint_stall_s: float = 0.0
    _life: Life | None = None
    _stopped: bool = False

    async def live(self, resume: Resume | None) -> dict[str, object]:
        """To the last step, and to the model that it leaves; the summary. Raises what stopped the run."""
        lost: PolicyLostError | RollBackError | None = None
        while True:
            try:
                if lost is not None:
                    resume = await self._recovered(lost)
                return await self._lived(resume)
            except (BaseExceptionGroup, PolicyLostError) as errors:
                error = first_cause(errors)
                if not isinstance(error, PolicyLostError | RollBackError):
                    raise
            lost = error
            self._count(lost)

    async def _lived(self, resume: Resume | None) -> dict[str, object]:
        """One life, to its end."""
        life = self._life = await begin(self.run, self.policy, resume, self.num_roll_backs)
        if self._stopped:
            await life.pacer.stop()
        try:
            await life.live()
        finally:
            self.checkpoint_stall_s += life.checkpointer.stall_s
        await self.policy.save(self.run.folder.model)
        return life.summary() | {
            "checkpoint_stall_s": self.checkpoint_stall_s,
            "policy_restarts": self.num_lost,
            "roll_backs": self.num_roll_backs,
        }

    async def stop(self) -> None:
        """The run ends in order after the step under way, also when that is in a life to come."""
        self._stopped = True
        if self._life is not None:
            await self._life.pacer.stop()

    def _count(self, error: PolicyLostError | RollBackError) -> None:
        """RunError when a policy was lost too often; of rolling back the rule's own budget was asked (health.py)."""
        if isinstance(error, RollBackError):
            self.num_roll_backs += 1
            return
        self.num_lost += 1
        allowed = self.run.recipe.policy.max_restarts
        if self.num_lost > allowed:
            raise RunError(f"{error}; the policy was lost {self.num_lost} times, policy.max_restarts allows {allowed}")

    async def _recovered(self, error: PolicyLostError | RollBackError) -> Resume | None:
        """Where the run goes on from, with a new policy and replicas that hold no version."""
        recipe, folder = self.run.recipe, self.run.folder
        store = CheckpointStore(folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.best)
        if self._stopped and store.versions():
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
            self.run.progress.say(note)
        folder.rewind(recipe, version)
        await within(timeout_s, aside(store.discard_after, version), "removing what came later")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.run.workers.fleet.forget())
            started = tasks.create_task(self._started())
        self.policy = started.result()
        return resume

    async def _started(self) -> PolicyGroup:
        """New ranks; that they do not start is one loss more."""
        try:
            return await self.run.workers.ranks.start()
        except RunError as error:
            raise PolicyLostError(str(error)) from error
