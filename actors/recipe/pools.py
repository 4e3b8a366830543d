"""A pool is placed iff the recipe has work for it."""

from collections.abc import Iterator

from actors.recipe.base import OfflineRecipe
from actors.recipe.schema import GrpoRecipe, Recipe
from placement.config import PoolConfig


def used_pools(recipe: Recipe) -> dict[str, PoolConfig]:
    """The pools that a run starts; a reference that is below an adapter needs none."""
    pools = recipe.pools
    match recipe:
        case OfflineRecipe():
            return {"policy": pools.policy}
        case GrpoRecipe():
            reference = {"reference": pools.reference} if recipe.has_reference_workers else {}
            critic = {"critic": pools.critic} if pools.critic is not None else {}
            return {"policy": pools.policy, **critic, **reference, "reward": pools.reward, "rollout": pools.rollout}


def first_pools(recipe: Recipe) -> dict[str, PoolConfig]:
    """What a run needs to begin: of replicas that come and go, the fewest."""
    return [used_pools(recipe), *fewer_pools(recipe)][-1]


def fewer_pools(recipe: Recipe) -> Iterator[dict[str, PoolConfig]]:
    """What a run can do with where there is no room for all: of replicas that come and go one less, and so on down to
    the fewest."""
    pools = used_pools(recipe)
    if "rollout" not in pools:
        return
    rollout = recipe.pools.rollout
    for number in range(rollout.num_workers - 1, rollout.least - 1, -1):
        yield pools | {"rollout": rollout.model_copy(update={"num_workers": number})}
