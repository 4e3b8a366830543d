"""One supervised run from its recipe to its run folder, on the same policy ranks that GRPO uses."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from actors.checkpoint.checkpointer import Checkpointer
from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.resume import Resume
from actors.checkpoint.store import CheckpointStore
from actors.data.examples import ExampleStream
from actors.errors import PolicyLostError, RunError, StoppedError
from actors.pacer import ReadyGroup
from actors.policy_group import PolicyGroup
from actors.recipe.schema import SftRecipe
from actors.recipe.upkeep import LivenessConfig
from actors.run.folder import RunFolder
from actors.run.plot import plot_loss
from actors.run.progress import RunProgress
from actors.run.recovery import Recovery, new_policy
from actors.run.sight import Member, Sight, look, suspected
from actors.run.signals import on_signal
from actors.run.suspect import POLICY
from actors.run.tracker import Tracker
from actors.settings import ModelSource
from actors.workers import Ranks, policy_ranks
from algorithms.costs import SequenceCosts
from algorithms.packing import pack
from algorithms.slots import PacerState
from algorithms.types import Batch, Group, MicroBatch, Prompt, Rollout, Sample
from placement.groups import ReservedPools

_LIVENESS = LivenessConfig()
"""How ranks are watched; a supervised run has no other workers."""


async def run_sft(
    recipe: SftRecipe,
    model: ModelSource,
    examples: ExampleStream,
    tokenizer: PreTrainedTokenizerBase,
    pools: ReservedPools,
    folder: RunFolder,
    progress: RunProgress,
    resume: Resume | None = None,
) -> None:
    """Train, from the beginning or from a cut; raises what stopped the run, after the workers are gone."""
    progress.say("starting the policy")
    config = recipe.model_dump(mode="json")
    async with policy_ranks(recipe, model, pools, folder.path) as (ranks, policy):
        with Tracker(recipe.logging.wandb_project, recipe.name, folder.path, config) as tracker:
            lives = Lives(recipe, examples, tokenizer, folder, progress, tracker, ranks, policy)
            with on_signal(lives.stop, progress.say):
                summary = await lives.recovery.live(resume)
    tokenizer.save_pretrained(folder.model)
    plot_loss(folder.read_metrics(), folder.path / "loss.png")
    folder.write_summary(summary)


@dataclass(slots=True)
class Lives:
    """The lives of a run: each has its ranks and what it has learned, and nothing of those before."""

    recipe: SftRecipe
    examples: ExampleStream
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

    async def _lived(self, resume: Resume | None, _: bool) -> dict[str, Any]:
        """One life, to its end; no rule of health ever rolls a supervised run back."""
        learner = Learner(self.recipe, self.examples, self.policy, self.folder, self.progress, self.tracker)
        async with suspected(self._look, self.folder.stall), self.policy.watched(_LIVENESS):
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

    recipe: SftRecipe
    examples: ExampleStream
    policy: PolicyGroup
    folder: RunFolder
    progress: RunProgress
    tracker: Tracker
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
                await checkpointer.last(self.version)
                raise StoppedError(f"stopped after {self.version} of {num_steps} steps; the same command goes on")
            await self._step()
            await checkpointer.after(self.version)

    async def _step(self) -> None:
        recipe, step = self.recipe, self.version
        first = step * recipe.batch_size
        rollouts = _examples(self.examples, first, recipe.batch_size)
        max_tokens = recipe.policy.max_tokens_per_micro_batch
        batch = _batch(rollouts, step, len(self.policy.ranks), max_tokens, self.policy.costs)
        update = await self.policy.step(batch, [_group(first + index, r) for index, r in enumerate(rollouts)])
        if update.skipped:
            raise RunError(
                f"the loss or the gradient of step {step} is not finite, and the weights were left as they were; lower "
                "optimizer.learning_rate, or look for an example that is out of the ordinary"
            )
        self.version = update.version
        self._totals.losses.append(update.metrics["loss"])
        self._totals.tokens_trained += batch.num_loss_tokens
        self.metrics = {**update.metrics, "num_tokens": float(self._totals.tokens_trained)}
        self.folder.write_metrics(step, self.metrics)
        self.tracker.log(step, self.metrics)
        speed = f"{self.metrics['policy_tok_per_s']:.0f} tok/s"
        self.progress.step(update.version, {"loss": f"{self.metrics['loss']:.4f}", "policy": speed})

    def moment(self, version: int) -> tuple[Cut, list[ReadyGroup]]:
        """Examples are a pure function of the step, so the cut holds little more than its number."""
        next_ordinal = version * self.recipe.batch_size
        pacer = PacerState(version, self.recipe.steps - version, next_ordinal, unfinished=(), ready=())
        return Cut(version, 0, pacer, self._so_far()), []

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


def _examples(examples: ExampleStream, first: int, count: int) -> list[Rollout]:
    try:
        return [examples.example(first + index) for index in range(count)]
    except ValueError as error:  # a row behind those that were looked at before the run
        raise RunError(str(error)) from error


def _batch(rollouts: Sequence[Rollout], version: int, num_ranks: int, max_tokens: int, costs: SequenceCosts) -> Batch:
    samples = [Sample(group, 0, rollout.num_tokens, advantage=0.0) for group, rollout in enumerate(rollouts)]
    costs_S = [costs.of(rollout.num_tokens, rollout.num_loss_tokens) for rollout in rollouts]
    packed = pack([rollout.num_tokens for rollout in rollouts], num_ranks, max_tokens, costs_S)
    return Batch(
        version=version,
        ranks=tuple(tuple(MicroBatch(tuple(samples[i] for i in micro)) for micro in rank) for rank in packed),
        num_sequences=len(rollouts),
        num_loss_tokens=sum(rollout.num_loss_tokens for rollout in rollouts),
        oldest_version=0,
    )


def _group(ordinal: int, example: Rollout) -> Group:
    """An example as a group of one: nothing was sampled, so there is no replica and no version."""
    prompt = Prompt(ordinal, epoch=0, token_ids=(), text="", columns={})
    return Group(prompt, (example,), attempt=0, replica=-1)
