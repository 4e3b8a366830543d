"""What a recipe means to the simulator: its numbers, and the run whose lengths it draws from."""

from actors.recipe.schema import GrpoRecipe, Recipe
from algorithms.simulation.config import TraceLengths
from algorithms.simulation.lengths import Trace
from algorithms.simulation.setup import Setup
from deploy.simulate.record import read_lengths


def simulated(recipe: Recipe) -> GrpoRecipe:
    """The recipe, if there is anything to schedule in it."""
    if not isinstance(recipe, GrpoRecipe):
        raise ValueError(f"simulate schedules rollouts, which a recipe of kind {recipe.kind!r} has none of")
    return recipe


def setup_of(recipe: GrpoRecipe) -> Setup:
    """The recipe's numbers; whether weights are swapped in flight is decided as in actors/workers.py."""
    staleness = recipe.staleness
    in_flight = staleness.in_flight_updates and staleness.max_staleness > 0
    return Setup(
        steps=recipe.steps,
        groups_per_batch=recipe.groups_per_batch,
        num_generations=recipe.algorithm.num_generations,
        max_completion_length=recipe.generation.max_completion_length,
        num_replicas=recipe.pools.rollout.num_workers,
        max_num_seqs=recipe.rollout.max_num_seqs,
        max_groups_per_replica=recipe.max_groups_per_replica,
        num_policy_workers=recipe.pools.policy.num_workers,
        num_critic_workers=0 if recipe.pools.critic is None else recipe.pools.critic.num_workers,
        max_staleness=staleness.max_staleness,
        when_stale=staleness.when_stale,
        over_sampling=staleness.over_sampling,
        pipeline_depth=recipe.pipeline_depth,
        in_flight_updates=in_flight,
        takes_turns=in_flight and recipe.pools.rollout.colocate_with is not None,
    )


def trace_of(recipe: GrpoRecipe) -> Trace:
    """The groups that the recipe's lengths are drawn from; none when they have a formula."""
    lengths = recipe.simulation.lengths
    if not isinstance(lengths, TraceLengths):
        return ()
    try:
        return read_lengths(lengths.path)
    except ValueError as error:
        raise ValueError(f"simulation.lengths.path: {error}") from None
