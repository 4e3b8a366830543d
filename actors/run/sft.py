"""One run that samples nothing, from its recipe to its run folder, on the same policy ranks that GRPO uses."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from actors.checkpoint.checkpointer import Checkpointer
from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.resume import Resume
from actors.checkpoint.store import CheckpointStore
from actors.errors import PolicyLostError, RunError, StoppedError
from actors.pacer import ReadyGroup
from actors.policy_group import PolicyGroup
from actors.recipe.schema import OfflineKind
from actors.recipe.upkeep import LivenessConfig
from actors.run.folder import RunFolder
from actors.run.lessons import Lesson, Stream, lesson_of
from actors.run.machine import machine_watched
from actors.run.plot import plot_loss
from actors.run.progress import RunProgress
from actors.run.pulse import pulse_watched
from actors.run.recovery import Recovery, new_policy
from actors.run.sight import Member, Sight, look, suspected
from actors.run.signals import on_signal
from actors.run.suspect import POLICY
from actors.run.tracker import Tracker
from actors.settings import ModelSource
from actors.workers import Ranks, policy_ranks
from algorithms.slots import PacerState
from placement.groups import ReservedPools

_LIVENESS = LivenessConfig()
"""How ranks are watched; a supervised run has no other workers."""


async def run_sft(
    recipe: OfflineKind,
    model: ModelSource,
    stream: Stream,
    tokenizer: PreTrainedTokenizerBase,
    pools: ReservedPools,
    folder: RunFolder,
    progress: RunProgress,
    resume: Resume | None = None,
) -> None:
    """Train, from the beginning or from a cut; raises what stopped the run, after the workers are gone."""
    progress.say("starting the policy")
    config = recipe.model_dump(mode="json")
    starting = policy_ranks(recipe, model, pools, folder.path)
    async with pulse_watched(folder.stall), machine_watched(_LIVENESS, progress.say), starting as (ranks, policy):
        with Tracker(recipe.logging.wandb_project, recipe.name, folder.path, config, progress.say) as tracker:
            lives = Lives(recipe, stream, tokenizer, folder, progress, tracker, ranks, policy)
            with on_signal(lives.stop, progress.say):
                summary = await lives.recovery.live(resume)
    tokenizer.save_pretrained(folder.model)
    plot_loss(folder.read_metrics(), folder.path / "loss.png")
    folder.write_summary(summary)


@dataclass(slots=True)
class Lives:
    """The lives of a run: each has its ranks and what it has learned, and nothing of those before."""

    recipe: OfflineKind
    stream: Stream
    tokenizer: PreTrainedTokenizerBase
    folder: RunFolder
    progress: RunProgress
    tracker: Tracker
    ranks: Ranks
    policy: PolicyGroup
    recovery: Recovery = field(init=False)
    checkpoint_stall_s: float = 0.0

    def __post_init__(self) -> None:
        self.recovery = Recovery(self.recipe, self.folder, self.progress.say, self._lived, self._renewed)

    async def stop(self) -> None:
        """No further step; the one under way is finished."""
        self.recovery.stopped = True

    async def _lived(self, resume: Resume | None) -> dict[str, Any]:
        """One life, to its end; no rule of health ever rolls a supervised run back."""
        recipe, policy = self.recipe, self.policy
        lesson = lesson_of(recipe, self.stream, policy, self.folder.path, self.progress.say)
        num_rows = len(self.stream.rows)
        learner = Learner(recipe, lesson, policy, self.folder, self.progress, self.tracker, num_rows)
        async with suspected(self._look, self.folder.stall), policy.watched(_LIVENESS):
            steps = range(0 if resume is None else resume.cut.version, recipe.steps)
            await lesson.prepare(steps, lambda: self.recovery.stopped)
            if resume is not None:
                await learner.restore(resume)
            checkpointer = self._checkpointer(learner, resume)
            try:
                await learner.run(checkpointer, lambda: self.recovery.stopped)
            except BaseException as error:
                # It is the policy that writes; and who presses Ctrl-C twice does not want to wait long.
                hurried = isinstance(error, PolicyLostError | asyncio.CancelledError)
                await checkpointer.finish(_LIVENESS.timeout_s if hurried else None)
                raise
            finally:
                self.checkpoint_stall_s += checkpointer.stall_s
            await checkpointer.finish()
            await self.policy.save(self.folder.model)
            await checkpointer.conclude()
        return learner.summary() | {"checkpoint_stall_s": self.checkpoint_stall_s}

    async def _renewed(self) -> None:
        self.policy = await new_policy(self.ranks)

    async def _look(self, reason: str) -> Sight:
        members = [Member(POLICY, number, handle) for number, handle in enumerate(self.policy.ranks)]
        return await look(members, (), reason, {}, self.folder.stall, self.progress.say)

    def _checkpointer(self, learner: "Learner", resume: Resume | None) -> Checkpointer:
        recipe = self.recipe
        return Checkpointer(
            store=CheckpointStore(self.folder.checkpoints, recipe.checkpoint.keep, recipe.checkpoint.best),
            config=recipe.checkpoint,
            num_steps=recipe.steps,
            policy=self.policy,
            tokenizer=self.tokenizer,
            moment=learner.moment,
            metrics=lambda: learner.metrics,
            say=self.progress.say,
            healthy=lambda: True,  # a step that is not finite ends the run; the rules of health are about rollouts
            cut_version=None if resume is None else learner.version,
        )


@dataclass(slots=True)
class Learner:
    """Step n trains on the n-th batch of the examples, whenever and however often the run goes on."""

    recipe: OfflineKind
    lesson: Lesson
    policy: PolicyGroup
    folder: RunFolder
    progress: RunProgress
    tracker: Tracker
    num_rows: int
    version: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last step."""
    _totals: Progress = field(default_factory=Progress)
    _started: float = field(default_factory=time.monotonic)

    async def restore(self, resume: Resume) -> None:
        await self.policy.restore(resume.path)
        self.version, self._totals = resume.cut.version, resume.cut.progress
        self._totals.num_resumed += 1

    async def run(self, checkpointer: Checkpointer, stopped: Callable[[], bool]) -> None:
        num_steps = self.recipe.steps
        while self.version < num_steps:
            if stopped():
                newest = await checkpointer.last(self.version)
                raise StoppedError.after(self.version, num_steps, newest)
            await self._step()
            await checkpointer.after(self.version)

    async def _step(self) -> None:
        step = self.version
        update, num_tokens = await self.lesson.step(step)
        if update.skipped:
            raise RunError(
                f"the loss or the gradient of step {step} is not finite, and the weights were left as they were; lower "
                "optimizer.learning_rate, or look for an example that is out of the ordinary"
            )
        self.version = update.version
        self._totals.losses.append(update.metrics["loss"])
        self._totals.tokens_trained += num_tokens
        self.metrics = {**update.metrics, "num_tokens": float(self._totals.tokens_trained)}
        self.folder.write_metrics(step, self.metrics)
        self.tracker.log(step, self.metrics)
        speed = f"{self.metrics['policy_tok_per_s']:.0f} tok/s"
        self.progress.step(update.version, {"loss": f"{self.metrics['loss']:.4f}", "policy": speed})

    def moment(self, version: int) -> tuple[Cut, list[ReadyGroup]]:
        """Examples are a pure function of the step, so the cut holds little more than its number."""
        next_ordinal = version * self.recipe.batch_size
        pacer = PacerState(version, self.recipe.steps - version, next_ordinal, unfinished=(), ready=())
        return Cut(version, 0, pacer, self._so_far(), num_rows=self.num_rows), []

    def _so_far(self) -> Progress:
        wall_s = self._totals.wall_s + time.monotonic() - self._started
        return msgspec.structs.replace(self._totals, losses=list(self._totals.losses), wall_s=wall_s)

    def summary(self) -> dict[str, Any]:
        """The figures of the whole run."""
        totals = self._so_far()
        tenth = max(1, len(totals.losses) // 10)
        return {
            "steps": self.recipe.steps,
            "seed": self.recipe.seed,
            "loss_first": sum(totals.losses[:tenth]) / tenth,
            "loss_last": sum(totals.losses[-tenth:]) / tenth,
            "weight_version": self.version,
            "tokens_trained": totals.tokens_trained,
            "resumed": totals.num_resumed,
            "wall_s": totals.wall_s,
        }
