"""Every worker of a run is an actor on its own bundle, and all are stopped when the run ends, however it ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.deadline import DeadlineError, within
from actors.policy import Objective, PolicyActor, PolicySettings
from actors.policy_group import PolicyGroup
from actors.recipe import GrpoRecipe, Recipe, SftRecipe
from actors.reference import ReferenceActor, ReferenceSettings
from actors.reward import RewardActor
from actors.rollout import RolloutActor, RolloutSettings
from placement.groups import ReservedPools

_CLOSE_TIMEOUT_S = 30.0
_START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where every worker loads the same weights and tokenizer from."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors of a GRPO run, by pool."""

    policy: PolicyGroup
    references: tuple[ActorHandle, ...]
    rewards: tuple[ActorHandle, ...]
    replicas: tuple[ActorHandle, ...]


@contextlib.asynccontextmanager
async def policy_group(recipe: Recipe, model: ModelSource, pools: ReservedPools) -> AsyncIterator[PolicyGroup]:
    """All policy ranks, with the model loaded."""
    pool = recipe.pools.policy
    settings = PolicySettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        num_ranks=pool.num_workers,
        use_gpu=pool.gpus_per_worker > 0,
        seed=recipe.seed,
        num_steps=recipe.steps,
        policy=recipe.policy,
        optimizer=recipe.optimizer,
        objective=_objective(recipe),
    )
    actor: Any = ray.remote(PolicyActor)
    ranks = tuple(
        actor.options(**pools.options("policy", rank)).remote(rank, settings) for rank in range(pool.num_workers)
    )
    try:
        group = PolicyGroup(ranks, settings.objective.max_completion_length, recipe.policy.timeout_s)
        await group.start(_START_TIMEOUT_S)
        yield group
    finally:
        _kill(ranks)


@contextlib.asynccontextmanager
async def grpo_workers(recipe: GrpoRecipe, model: ModelSource, pools: ReservedPools) -> AsyncIterator[Workers]:
    """All workers of the run, started side by side."""
    rewards = _spawn(RewardActor, "reward", recipe, pools, recipe.rewards.functions, recipe.rewards.timeout_s)
    references = (
        _spawn(ReferenceActor, "reference", recipe, pools, _reference_settings(recipe, model))
        if recipe.algorithm.beta > 0
        else ()
    )
    settings = _rollout_settings(recipe, model)
    rollout_actor: Any = ray.remote(RolloutActor)
    replicas = tuple(
        rollout_actor.options(**pools.options("rollout", replica)).remote(
            replica, settings, list(rewards), list(references)
        )
        for replica in range(recipe.pools.rollout.num_workers)
    )
    try:
        starts = [within(recipe.rollout.start_timeout_s, r.start.remote(), f"starting {r}") for r in replicas]
        starts += [within(_START_TIMEOUT_S, r.start.remote(), f"starting {r}") for r in references]
        starts += [within(_START_TIMEOUT_S, r.check.remote(), f"starting {r}") for r in rewards]
        started = asyncio.gather(*starts)
        async with policy_group(recipe, model, pools) as policy:
            await started
            yield Workers(policy, references, rewards, replicas)
    finally:
        await _close((*replicas, *rewards))
        _kill((*replicas, *rewards, *references))


def _spawn(kind: type, pool: str, recipe: Recipe, pools: ReservedPools, *arguments: Any) -> tuple[ActorHandle, ...]:
    actor: Any = ray.remote(kind)
    num_workers = getattr(recipe.pools, pool).num_workers
    return tuple(actor.options(**pools.options(pool, worker)).remote(*arguments) for worker in range(num_workers))


async def _close(actors: tuple[ActorHandle, ...]) -> None:
    """Let actors that own child processes end them; a worker that does not answer is killed with its children."""
    with contextlib.suppress(DeadlineError, ray.exceptions.RayError):
        closing = asyncio.gather(*(actor.close.remote() for actor in actors), return_exceptions=True)
        await within(_CLOSE_TIMEOUT_S, closing, "closing the workers")


def _kill(actors: tuple[ActorHandle, ...]) -> None:
    for actor in actors:
        ray.kill(actor)


def _objective(recipe: Recipe) -> Objective:
    match recipe:
        case GrpoRecipe():
            generation = recipe.generation
            return Objective(recipe.algorithm, generation.temperature, generation.max_completion_length)
        case SftRecipe():
            return Objective(None, temperature=1.0, max_completion_length=recipe.max_length)


def _reference_settings(recipe: GrpoRecipe, model: ModelSource) -> ReferenceSettings:
    return ReferenceSettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        dtype=recipe.policy.dtype,
        temperature=recipe.generation.temperature,
        max_tokens=recipe.policy.max_tokens_per_micro_batch,
        use_gpu=recipe.pools.reference.gpus_per_worker > 0,
    )


def _rollout_settings(recipe: GrpoRecipe, model: ModelSource) -> RolloutSettings:
    pool = recipe.pools.rollout
    return RolloutSettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        num_generations=recipe.algorithm.num_generations,
        generation=recipe.generation,
        rollout=recipe.rollout,
        tensor_parallel_size=max(1, pool.gpus_per_worker),
        use_gpu=pool.gpus_per_worker > 0,
        seed=recipe.seed,
        in_flight_updates=recipe.staleness.in_flight_updates and recipe.staleness.max_staleness > 0,
        recompute_kv_cache=recipe.staleness.kv_cache == "recompute",
    )
