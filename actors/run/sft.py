"""One supervised run from its recipe to its run folder, on the same policy ranks that GRPO uses."""

import time
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from actors.data.examples import ExampleStream
from actors.policy_group import PolicyGroup
from actors.recipe.schema import SftRecipe
from actors.run.folder import RunFolder
from actors.run.plot import plot_loss
from actors.run.progress import RunProgress
from actors.run.tracker import Tracker
from actors.settings import ModelSource
from actors.workers import policy_group
from algorithms.packing import pack
from algorithms.types import Batch, Group, MicroBatch, Prompt, Rollout, Sample
from placement.groups import ReservedPools


async def run_sft(
    recipe: SftRecipe,
    model: ModelSource,
    examples: ExampleStream,
    tokenizer: PreTrainedTokenizerBase,
    pools: ReservedPools,
    folder: RunFolder,
    progress: RunProgress,
) -> None:
    """Train; raises what stopped the run, after the workers are gone."""
    started = time.monotonic()
    progress.say("starting the policy")
    config = recipe.model_dump(mode="json")
    async with policy_group(recipe, model, pools, folder.path) as policy:
        with Tracker(recipe.logging.wandb_project, recipe.name, folder.path, config) as tracker:
            losses, num_trained = await _learn(recipe, examples, policy, folder, progress, tracker)
        await policy.save(folder.model)
    tokenizer.save_pretrained(folder.model)
    plot_loss(folder.read_metrics(), folder.path / "loss.png")
    tenth = max(1, len(losses) // 10)
    folder.write_summary(
        {
            "steps": recipe.steps,
            "seed": recipe.seed,
            "loss_first": sum(losses[:tenth]) / tenth,
            "loss_last": sum(losses[-tenth:]) / tenth,
            "weight_version": recipe.steps,
            "tokens_trained": num_trained,
            "wall_s": time.monotonic() - started,
        }
    )


async def _learn(
    recipe: SftRecipe,
    examples: ExampleStream,
    policy: PolicyGroup,
    folder: RunFolder,
    progress: RunProgress,
    tracker: Tracker,
) -> tuple[list[float], int]:
    """The losses of all steps, and how many tokens were trained."""
    losses: list[float] = []
    num_trained = 0
    for step in range(recipe.steps):
        first = step * recipe.batch_size
        rollouts = [examples.example(first + index) for index in range(recipe.batch_size)]
        batch = _batch(rollouts, step, len(policy.ranks), recipe.policy.max_tokens_per_micro_batch)
        update = await policy.step(batch, [_group(first + index, r) for index, r in enumerate(rollouts)])
        losses.append(update.metrics["loss"])
        num_trained += batch.num_loss_tokens
        metrics = {**update.metrics, "num_tokens": float(num_trained)}
        folder.write_metrics(step, metrics)
        tracker.log(step, metrics)
        speed = f"{metrics['policy_tok_per_s']:.0f} tok/s"
        progress.step(step + 1, {"loss": f"{metrics['loss']:.4f}", "policy": speed})
    return losses, num_trained


def _batch(rollouts: Sequence[Rollout], version: int, num_ranks: int, max_tokens: int) -> Batch:
    samples = [Sample(group, 0, rollout.num_tokens, advantage=0.0) for group, rollout in enumerate(rollouts)]
    packed = pack([rollout.num_tokens for rollout in rollouts], num_ranks, max_tokens)
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
