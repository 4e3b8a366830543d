"""An engine of the recipe's kind computes the log-probabilities that the policy computes, before any weight is sent.

The policy's side is a reference worker: it has the forward pass of the policy's ranks, and neither DeepSpeed nor an
optimizer. One of them runs at a time, so a single GPU holds both, one after the other.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from actors.data.dataset import Rows
from actors.data.prompts import PromptStream
from actors.model.tiny import make_tiny_model
from actors.recipe.model import TinyModel
from actors.recipe.schema import GrpoRecipe
from actors.reference import ReferenceSettings, reference_actor
from actors.rollout import RolloutActor, RolloutSettings
from actors.settings import ModelSource, reference_settings, rollout_settings
from algorithms.types import Group, Prompt, Rollout
from deploy.doctor.check import Finding, failed, passed, skipped, warned
from deploy.doctor.data import first_model, rows_of
from deploy.nodes import nearest
from deploy.shapes import model_shape
from deploy.train import stream_of, words
from placement.memory.footprint import GB

EXACT, HALF, HALF_BAD = 5e-3, 0.03, 0.1
"""Nats for each token: the largest difference in float32, and the mean one in bfloat16 that is remarkable, or wrong.
The tests hold 1e-3 in float32, on tiny models; of bfloat16 nothing was measured on a GPU yet."""
_CLOSE_TIMEOUT_S = 60.0
_MOST_TOKENS = 256


def check_agreement(recipe: GrpoRecipe, gpu_gb: float | None) -> Finding:
    """`gpu_gb`: memory of a GPU, where it is known."""
    import ray

    if not ray.is_initialized():
        return skipped("Ray was not reached")
    rows = rows_of(recipe)
    if rows is None:
        return skipped("the data set could not be read")
    if (whole := _whole_gb(recipe)) is not None and gpu_gb is not None and whole > 0.8 * gpu_gb:
        return skipped(f"the model takes {whole:.0f} GB, and one GPU, on which both sides compute, has {gpu_gb:.0f}")
    token_ids = _prompt(recipe, rows)
    with TemporaryDirectory(prefix=".doctor-", dir=nearest(recipe.folder)) as folder:  # where every node sees it
        source = first_model(recipe)
        if isinstance(source, TinyModel):
            make_tiny_model(source, Path(folder) / "model", recipe.seed)
            source = ModelSource(str(Path(folder) / "model"))
        policy, rollout = settings_of(recipe, source)
        ours = policy_logprobs(policy, token_ids, recipe)
        theirs = engine_logprobs(rollout, token_ids, recipe)
    return judged(ours, theirs, is_exact=policy.dtype == recipe.rollout.dtype == "float32")


def settings_of(recipe: GrpoRecipe, source: ModelSource) -> tuple[ReferenceSettings, RolloutSettings]:
    """Of both sides; the temperature is 1, at which engines tell what a prompt's tokens would have had."""
    use_gpu = recipe.pools.policy.gpus_per_worker > 0
    told = reference_settings(recipe.model_copy(update={"reference": None}), source)
    generation = recipe.generation.model_copy(update={"temperature": 1.0})
    rollout = replace(rollout_settings(recipe, source), generation=generation, lora=None)
    return replace(told, temperature=1.0, use_gpu=use_gpu), rollout


def policy_logprobs(settings: ReferenceSettings, token_ids: Sequence[int], recipe: GrpoRecipe) -> list[float]:
    """Of every token but the first."""
    import ray

    takes = {"num_gpus": int(settings.use_gpu), "num_cpus": recipe.pools.policy.cpus_per_worker}
    actor: Any = reference_actor().options(**takes).remote(settings)
    timeout_s = recipe.rollout.start_timeout_s
    length = len(token_ids)
    rollout = Rollout(
        token_ids_T=np.array(token_ids, np.int32),
        loss_mask_T=np.arange(length) >= 1,
        logprobs_T=np.zeros(length, np.float32),
        spans=(),
        finish_reason="stop",
    )
    try:
        scored: Group = ray.get(
            actor.score.remote(Group(Prompt(0, 0, (), "", {}), (rollout,), 0, 0)), timeout=timeout_s
        )
    finally:
        ray.kill(actor)
    logprobs_T = scored.rollouts[0].reference_logprobs_T
    assert logprobs_T is not None
    return [float(logprob) for logprob in logprobs_T[1:]]


def engine_logprobs(settings: RolloutSettings, token_ids: Sequence[int], recipe: GrpoRecipe) -> list[float]:
    """The same of a replica, which serves the weights that it was started with."""
    import ray

    pool = recipe.pools.rollout
    takes = {"num_gpus": pool.gpus_per_worker, "num_cpus": pool.cpus_per_worker}
    actor: Any = ray.remote(RolloutActor).options(**takes).remote(0, replace(settings, shares=False), [], [])
    try:
        ray.get(actor.start.remote(), timeout=recipe.rollout.start_timeout_s)
        scores: list[float] = ray.get(actor.score_tokens.remote(list(token_ids)), timeout=recipe.generation.timeout_s)
        ray.get(actor.close.remote(), timeout=_CLOSE_TIMEOUT_S)
    finally:
        ray.kill(actor)
    return scores


def judged(ours: Sequence[float], theirs: Sequence[float], is_exact: bool) -> Finding:
    """`is_exact`: both sides compute in float32."""
    apart = np.abs(np.array(ours) - np.array(theirs))
    if not np.isfinite(apart).all():
        return failed("log-probabilities that are not finite", "see whether the model's files are whole")
    most, mean = apart.max(), apart.mean()
    text = (
        f"{len(apart)} tokens of a prompt: policy and engine differ by {most:.2g} nats at most, {mean:.2g} on average"
    )
    if (most > EXACT) if is_exact else (mean > HALF_BAD):
        return failed(
            text,
            "vLLM computes another model than transformers does: see that both support this architecture, its rope "
            "scaling and its config; every importance weight would be wrong",
        )
    if not is_exact and mean > HALF:
        return warned(text, "set policy.dtype and rollout.dtype to float32 to see whether rounding is the cause")
    return passed(text)


def _prompt(recipe: GrpoRecipe, rows: Rows) -> list[int]:
    """The first prompt, not longer than it takes to see a difference, and two tokens at least."""
    tokenizer, num_positions = words(recipe)
    stream = stream_of(recipe, rows, tokenizer, num_positions)
    assert isinstance(stream, PromptStream)
    token_ids = list(stream.prompt(0).token_ids)[:_MOST_TOKENS]
    return token_ids if len(token_ids) > 1 else 2 * token_ids


def _whole_gb(recipe: GrpoRecipe) -> float | None:
    """The weights on one GPU; None on CPUs, and where they are not known."""
    if recipe.pools.policy.gpus_per_worker == 0:
        return None
    try:
        shape = model_shape(recipe)
    except ValueError:
        return None
    return None if shape is None else shape.num_parameters * (4 if recipe.policy.dtype == "float32" else 2) / GB
