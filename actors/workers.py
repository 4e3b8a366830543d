"""Every worker of a run is an actor on its own bundle, and all are stopped when the run ends, however it ends."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from actors.critic import critic_actor
from actors.deadline import DeadlineError, aside, within
from actors.elastic import Elastic
from actors.errors import RunError, last_line
from actors.fleet import Fleet
from actors.model.costs import sequence_costs
from actors.policy import policy_actor
from actors.policy_calls import PolicySettings
from actors.policy_group import PolicyGroup
from actors.recipe.schema import GrpoRecipe, Recipe
from actors.recipe.upkeep import LivenessConfig
from actors.reference import reference_actor
from actors.reward import RewardActor
from actors.rollout import RolloutActor
from actors.router import Router
from actors.scaling import ScaleFiles
from actors.scorers import Scorers
from actors.settings import (
    ModelSource,
    critic_settings,
    policy_settings,
    reference_settings,
    reward_functions,
    rollout_settings,
)
from actors.turns import Turns
from placement.elastic import num_first
from placement.groups import ReservedPools
from placement.plan import PlacementError

_ON_HOST = {"runtime_env": {"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}}
"""Options of workers that compute on the CPU with several threads. A thread that waits for the others of its process
sleeps, and does not spin: else it keeps a core from the replica that shares the machine, and so from the very threads
that it waits for. OpenMP reads this when it is loaded."""
_CLOSE_TIMEOUT_S = 30.0
_LOOK_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Roles:
    """The actor class behind each role; tests put others in their place."""

    policy: Any = field(default_factory=policy_actor)
    rollout: Any = field(default_factory=lambda: ray.remote(RolloutActor))
    reward: Any = field(default_factory=lambda: ray.remote(RewardActor))
    reference: Any = field(default_factory=reference_actor)
    critic: Any = field(default_factory=critic_actor)


@dataclass(slots=True)
class Ranks:
    """The policy's processes, or the critic's, which can be ended and made anew on the same bundles."""

    actor: Any
    settings: PolicySettings
    pools: ReservedPools
    pool: Literal["policy", "critic"] = "policy"
    handles: tuple[ActorHandle, ...] = ()

    async def start(self) -> PolicyGroup:
        """New ones with the initial weights, in place of those that there are."""
        self.end()
        ranks = range(self.settings.num_ranks)
        await asyncio.gather(*(_check_place(self.pools, self.pool, rank) for rank in ranks))
        host = {} if self.settings.use_gpu else _ON_HOST
        options = (self.pools.options(self.pool, rank) | host for rank in ranks)
        self.handles = tuple(self.actor.options(**o).remote(rank, self.settings) for rank, o in enumerate(options))
        longest = self.settings.objective.max_completion_length
        settings = self.settings
        reading = aside(sequence_costs, settings.model_path, settings.revision, settings.trust_remote_code)
        costs = await within(_START_TIMEOUT_S, reading, "reading the model's config")
        config = self.settings.policy
        group = PolicyGroup(self.handles, longest, config.timeout_s, costs, self.pool, config.sequence_parallel_size)
        await group.start(_START_TIMEOUT_S)
        return group

    def end(self) -> None:
        _kill(self.handles)


@dataclass(frozen=True, slots=True)
class Learners:
    """Whoever is in training; they are built, cut, lost and restored together."""

    policy: PolicyGroup
    critic: PolicyGroup | None = None
    """With algorithm.advantage 'gae' alone."""

    @contextlib.asynccontextmanager
    async def watched(self, config: LivenessConfig) -> AsyncIterator[None]:
        """PolicyLostError, in a group, when a rank of either gives no sign of life while the context is open."""
        if self.critic is None:
            async with self.policy.watched(config):
                yield
        else:
            async with self.policy.watched(config), self.critic.watched(config):
                yield


@dataclass(frozen=True, slots=True)
class Workers:
    """The actors of a GRPO run, by pool."""

    ranks: Ranks
    critic_ranks: Ranks | None
    fleet: Fleet
    scorers: Scorers
    rewards: tuple[ActorHandle, ...]
    references: tuple[ActorHandle, ...]
    elastic: Elastic | None = None
    """When replicas come and go."""

    @contextlib.asynccontextmanager
    async def scaled(self) -> AsyncIterator[None]:
        """Replicas come and go while the context is open, if they do in this run."""
        if self.elastic is None:
            yield
            return
        async with self.elastic.supervised():
            yield

    async def learners(self) -> Learners:
        """New ranks of whoever learns, side by side; the first that fails stops the start of the others."""
        async with self.fleet.resting(), asyncio.TaskGroup() as starts:
            policy = starts.create_task(self.ranks.start())
            critic = None if self.critic_ranks is None else starts.create_task(self.critic_ranks.start())
        return Learners(policy.result(), None if critic is None else critic.result())

    @property
    def starting(self) -> str:
        """Which workers are being started, and no group gets on without them; empty when there are none."""
        if self.elastic is not None and self.elastic.waits_for and not self.fleet.num_serving:
            return self.elastic.waits_for
        return "no rollout replica serves, and one is being started" if self.fleet.rebuilding else ""

    @property
    def there_since(self) -> float:
        """The time.monotonic() at which the last of these was there again: no group got on before."""
        return max(self.fleet.serves_since, self.scorers.there_since)


@contextlib.asynccontextmanager
async def policy_ranks(
    recipe: Recipe, model: ModelSource, pools: ReservedPools, run_dir: Path
) -> AsyncIterator[tuple[Ranks, PolicyGroup]]:
    """All policy ranks, with the model loaded, and how they are made anew."""
    ranks = Ranks(policy_actor(), policy_settings(recipe, model, run_dir), pools)
    try:
        yield ranks, await ranks.start()
    finally:
        ranks.end()


@contextlib.asynccontextmanager
async def grpo_workers(
    recipe: GrpoRecipe,
    model: ModelSource,
    pools: ReservedPools,
    run_dir: Path,
    router: Router,
    say: Callable[[str], None],
    roles: Roles,
) -> AsyncIterator[tuple[Workers, Learners]]:
    """All workers of the run, started side by side but for engines that share the policy's GPUs, which come last.

    The first that fails stops the start of the others.
    """
    workers = _spawn_all(recipe, model, pools, run_dir, router, say, roles)
    try:
        async with asyncio.TaskGroup() as starts:
            learners = starts.create_task(workers.learners())
            if not workers.fleet.shares:
                starts.create_task(workers.fleet.start())
            for index, reference in enumerate(workers.references):
                starts.create_task(_started(reference.start, f"reference worker {index}"))
            for index, reward in enumerate(workers.rewards):
                starts.create_task(_started(reward.check, f"reward worker {index}"))
        if workers.fleet.shares:  # an engine measures at its start what memory the others have left
            await workers.fleet.start()
        yield workers, learners.result()
    finally:
        await workers.fleet.close()
        await _close(workers.rewards)
        _kill([*workers.rewards, *workers.references])
        workers.ranks.end()
        if workers.critic_ranks is not None:
            workers.critic_ranks.end()


async def _started(method: Any, who: str) -> None:
    """Start one worker; RunError says who could not, and why."""
    try:
        await within(_START_TIMEOUT_S, method.remote(), f"starting {who}")
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
) -> Workers:
    restarts = recipe.liveness.max_restarts

    def scorers(actor: Any, pool: str, num_workers: int, *arguments: Any) -> tuple[ActorHandle, ...]:
        options = (pools.options(pool, index) for index in range(num_workers))
        return tuple(actor.options(max_restarts=restarts, **option).remote(*arguments) for option in options)

    how = recipe.rewards
    called = reward_functions(recipe), how.timeout_s, how.max_concurrent_groups, how.max_memory_gb
    rewards = scorers(roles.reward, "reward", recipe.pools.reward.num_workers, *called)
    num_references = recipe.pools.reference.num_workers if recipe.has_reference_workers else 0
    references = scorers(roles.reference, "reference", num_references, reference_settings(recipe, model))
    settings = rollout_settings(recipe, model)

    def spawn(number: int, bundle: int) -> ActorHandle:
        options = pools.options("rollout", bundle)
        handle: ActorHandle = roles.rollout.options(**options).remote(number, settings, [*rewards], [*references])
        return handle

    pool, seats = recipe.pools.rollout, pools.seats.get("rollout")
    fleet = Fleet(
        spawn,
        pool.num_workers if seats is None else min(pool.num_workers, num_first(seats.look())),
        router,
        start_timeout_s=recipe.rollout.start_timeout_s,
        max_rebuilds=recipe.rollout.max_rebuilds,
        say=say,
        turns=None if pool.colocate_with is None else Turns(),
    )
    if pool.colocate_with is not None:

        async def is_gone(bundle: int) -> bool:
            """Never: no other machine's GPUs are those that it shares, so the run ends with the policy's."""
            await _check_place(pools, "rollout", bundle)
            return False

        fleet.is_gone = is_gone
    elastic = None
    if seats is not None:
        files, rollout = ScaleFiles(run_dir), recipe.rollout
        elastic = Elastic(pool, seats, fleet, files, rollout.leave_grace_s, rollout.capacity_timeout_s, say)
    by_name = {f"reward worker {index}": worker for index, worker in enumerate(rewards)}
    by_name |= {f"reference worker {index}": worker for index, worker in enumerate(references)}
    ranks = Ranks(roles.policy, policy_settings(recipe, model, run_dir), pools)
    critic = None
    if recipe.pools.critic is not None:
        critic = Ranks(roles.critic, critic_settings(recipe, model, run_dir), pools, "critic")
    return Workers(ranks, critic, fleet, Scorers(by_name, recipe.liveness, say), rewards, references, elastic)


async def _check_place(pools: ReservedPools, pool: str, worker: int) -> None:
    """RunError when what the worker shares is not there any more."""
    try:
        await within(_LOOK_TIMEOUT_S, aside(pools.check, pool, worker), "asking where the shared GPUs are")
    except PlacementError as error:
        raise RunError(str(error)) from error
    except (DeadlineError, ray.exceptions.RayError):
        pass  # the head is away, which others watch, and who is built looks himself (placement/home.py)


async def _close(actors: Sequence[ActorHandle]) -> None:
    """Let actors that own child processes end them; a worker that does not answer is killed with its children."""
    with contextlib.suppress(DeadlineError, ray.exceptions.RayError):
        closing = asyncio.gather(*(actor.close.remote() for actor in actors), return_exceptions=True)
        await within(_CLOSE_TIMEOUT_S, closing, "closing the workers")


def _kill(actors: Sequence[ActorHandle]) -> None:
    for actor in actors:
        ray.kill(actor)
