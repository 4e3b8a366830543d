"""Every worker of a run is an actor on its own bundle, and all are stopped when the run ends, however it ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.deadline import DeadlineError, within
from actors.errors import RunError, last_line
from actors.fleet import Fleet
from actors.policy import Objective, PolicySettings, policy_actor
from actors.policy_group import PolicyGroup
from actors.recipe.schema import GrpoRecipe, Recipe, SftRecipe
from actors.reference import ReferenceActor, ReferenceSettings
from actors.reward import RewardActor
from actors.rollout import RolloutActor, RolloutSettings
from actors.router import Router
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
class Roles:
    """The class behind each role, before Ray makes actors of it; tests put others in their place."""

    policy: Any = field(default_factory=policy_actor)
    rollout: Any = RolloutActor
    reward: Any = RewardActor
    reference: Any = ReferenceActor


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors of a GRPO run, by pool."""

    policy: PolicyGroup
    references: tuple[ActorHandle, ...]
    rewards: tuple[ActorHandle, ...]
    fleet: Fleet


@contextlib.asynccontextmanager
async def policy_group(
    recipe: Recipe, model: ModelSource, pools: ReservedPools, run_dir: Path
) -> AsyncIterator[PolicyGroup]:
    """All policy ranks, with the model loaded."""
    spawned: list[ActorHandle] = []
    try:
        group = _policy_group(recipe, model, pools, run_dir, spawned, policy_actor())
        await group.start(_START_TIMEOUT_S)
        yield group
    finally:
        _kill(spawned)


@contextlib.asynccontextmanager
async def grpo_workers(
    recipe: GrpoRecipe,
    model: ModelSource,
    pools: ReservedPools,
    run_dir: Path,
    router: Router,
    say: Callable[[str], None],
    roles: Roles,
) -> AsyncIterator[Workers]:
    """All workers of the run, started side by side; the first that fails stops the start of the others."""
    spawned: list[ActorHandle] = []
    workers: Workers | None = None
    try:
        workers = _spawn_all(recipe, model, pools, run_dir, router, say, roles, spawned)
        async with asyncio.TaskGroup() as starts:
            starts.create_task(workers.policy.start(_START_TIMEOUT_S))
            starts.create_task(workers.fleet.start())
            for index, reference in enumerate(workers.references):
                starts.create_task(_started(reference.start, f"reference worker {index}", _START_TIMEOUT_S))
            for index, reward in enumerate(workers.rewards):
                starts.create_task(_started(reward.check, f"reward worker {index}", _START_TIMEOUT_S))
        yield workers
    finally:
        if workers is not None:
            await workers.fleet.close()
            await _close(workers.rewards)
        _kill(spawned)


async def _started(method: Any, who: str, timeout_s: float) -> None:
    """Start one worker; RunError says who could not, and why."""
    try:
        await within(timeout_s, method.remote(), f"starting {who}")
    except ray.exceptions.RayError as error:
        raise RunError(f"{who} could not start: {last_line(error)}") from error


def _spawn_all(
    recipe: GrpoRecipe,
    model: ModelSource,
    pools: ReservedPools,
    run_dir: Path,
    router: Router,
    say: Callable[[str], None],
    roles: Roles,
    spawned: list[ActorHandle],
) -> Workers:
    functions, timeout_s = recipe.rewards.functions, recipe.rewards.timeout_s
    rewards = _spawn(ray.remote(roles.reward), "reward", recipe, pools, spawned, lambda _: (functions, timeout_s))
    references: tuple[ActorHandle, ...] = ()
    if recipe.algorithm.beta > 0:
        frozen = _reference_settings(recipe, model)
        references = _spawn(ray.remote(roles.reference), "reference", recipe, pools, spawned, lambda _: (frozen,))
    settings, scorers = _rollout_settings(recipe, model), (list(rewards), list(references))
    actor: Any = ray.remote(roles.rollout)

    def spawn(number: int, bundle: int) -> ActorHandle:
        handle: ActorHandle = actor.options(**pools.options("rollout", bundle)).remote(number, settings, *scorers)
        return handle

    fleet = Fleet(
        spawn,
        recipe.pools.rollout.num_workers,
        router,
        start_timeout_s=recipe.rollout.start_timeout_s,
        max_rebuilds=recipe.rollout.max_rebuilds,
        say=say,
    )
    policy = _policy_group(recipe, model, pools, run_dir, spawned, roles.policy)
    return Workers(policy, references, rewards, fleet)


def _spawn(
    actor: Any,
    pool: str,
    recipe: Recipe,
    pools: ReservedPools,
    spawned: list[ActorHandle],
    arguments: Callable[[int], tuple[Any, ...]],
) -> tuple[ActorHandle, ...]:
    """One actor on each bundle of the pool; `arguments` gives those of worker n."""
    num_workers = getattr(recipe.pools, pool).num_workers
    handles = tuple(actor.options(**pools.options(pool, n)).remote(*arguments(n)) for n in range(num_workers))
    spawned += handles
    return handles


def _policy_group(
    recipe: Recipe, model: ModelSource, pools: ReservedPools, run_dir: Path, spawned: list[ActorHandle], actor: Any
) -> PolicyGroup:
    settings = PolicySettings(
        model_path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        num_ranks=recipe.pools.policy.num_workers,
        use_gpu=recipe.pools.policy.gpus_per_worker > 0,
        seed=recipe.seed,
        num_steps=recipe.steps,
        policy=recipe.policy,
        optimizer=recipe.optimizer,
        objective=_objective(recipe),
        run_dir=str(run_dir),
    )
    ranks = _spawn(actor, "policy", recipe, pools, spawned, lambda rank: (rank, settings))
    return PolicyGroup(ranks, settings.objective.max_completion_length, recipe.policy.timeout_s)


async def _close(actors: Sequence[ActorHandle]) -> None:
    """Let actors that own child processes end them; a worker that does not answer is killed with its children."""
    with contextlib.suppress(DeadlineError, ray.exceptions.RayError):
        closing = asyncio.gather(*(actor.close.remote() for actor in actors), return_exceptions=True)
        await within(_CLOSE_TIMEOUT_S, closing, "closing the workers")


def _kill(actors: Sequence[ActorHandle]) -> None:
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


def score_timeout_s(recipe: GrpoRecipe) -> float:
    """Every reward function up to its own deadline, and before it all the groups that may queue for the worker."""
    queue = -(-recipe.max_groups_in_flight // recipe.pools.reward.num_workers)
    reference_s = recipe.policy.timeout_s if recipe.algorithm.beta > 0 else 0.0
    return 60.0 + queue * len(recipe.rewards.functions) * recipe.rewards.timeout_s + reference_s


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
        score_timeout_s=score_timeout_s(recipe),
        in_flight_updates=recipe.staleness.in_flight_updates and recipe.staleness.max_staleness > 0,
        recompute_kv_cache=recipe.staleness.kv_cache == "recompute",
        lora=recipe.policy.lora,
    )
