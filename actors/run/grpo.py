"""One GRPO run from its recipe to its run folder: start the workers, live until the last step, write the summary."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.checkpoint.resume import Resume
from actors.data.prompts import PromptStream
from actors.recipe.schema import GrpoRecipe
from actors.router import Router
from actors.run.folder import RunFolder
from actors.run.life import Life, Run, begin
from actors.run.machine import machine_watched
from actors.run.plot import plot_run
from actors.run.progress import RunProgress
from actors.run.pulse import pulse_watched
from actors.run.recovery import Recovery, new_learners
from actors.run.signals import on_signal
from actors.run.tracker import Tracker
from actors.settings import ModelSource
from actors.workers import Learners, Roles, grpo_workers
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
    async with pulse_watched(folder.stall), machine_watched(recipe.liveness, progress.say), starting as started:
        workers, learners = started
        with Tracker(recipe.logging.wandb_project, recipe.name, folder.path, config, progress.say) as tracker:
            lives = Lives(Run(recipe, prompts, tokenizer, folder, progress, tracker, router, workers), learners)
            async with workers.fleet.supervised(recipe.liveness), workers.scorers.watched(), workers.scaled():
                with on_signal(lives.stop, progress.say):
                    summary = await lives.recovery.live(resume)
    tokenizer.save_pretrained(folder.model)
    if recipe.pools.critic is not None:
        tokenizer.save_pretrained(folder.critic)
    plot_run(folder.read_metrics(), recipe.staleness.max_staleness, folder.plot)
    folder.write_summary(summary)


@dataclass(slots=True)
class Lives:
    """The lives of a run: the engines are the same in all of them."""

    run: Run
    learners: Learners
    recovery: Recovery = field(init=False)
    checkpoint_stall_s: float = 0.0
    _life: Life | None = None

    def __post_init__(self) -> None:
        run = self.run
        self.recovery = Recovery(run.recipe, run.folder, run.progress.say, self._lived, self._renewed)

    async def _lived(self, resume: Resume | None) -> dict[str, Any]:
        """One life, to its end."""
        life = self._life = await begin(self.run, self.learners, resume)
        if self.recovery.stopped:
            await life.pacer.stop()
        try:
            await life.live()
        finally:
            self.checkpoint_stall_s += life.checkpointer.stall_s
        policy, critic = self.learners.policy, self.learners.critic
        async with self.learners.watched(self.run.recipe.liveness):
            await policy.save(self.run.folder.model)
            if critic is not None:
                await critic.save(self.run.folder.critic)
            await life.checkpointer.conclude()
        return life.summary() | {"checkpoint_stall_s": self.checkpoint_stall_s}

    async def stop(self) -> None:
        """The run ends in order after the step under way, also when that is in a life to come."""
        self.recovery.stopped = True
        if self._life is not None:
            await self._life.pacer.stop()

    async def _renewed(self) -> None:
        """A new policy, a new critic, and replicas that hold no version."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.run.workers.fleet.forget())
            started = tasks.create_task(new_learners(self.run.workers))
        self.learners = started.result()
