"""A pool is placed iff the recipe has work for it."""

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
    pools = used_pools(recipe)
    if "rollout" in pools:
        pools["rollout"] = pools["rollout"].model_copy(update={"num_workers": recipe.pools.rollout.least})
    return pools
