"""A pool is placed iff the recipe has work for it."""

from actors.recipe.base import OfflineRecipe
from actors.recipe.schema import GrpoRecipe, Recipe
from placement.config import PoolConfig


def used_pools(recipe: Recipe) -> dict[str, PoolConfig]:
    """The pools that a run of the recipe starts; no KL penalty, no reference; no GAE, no critic."""
    pools = recipe.pools
    match recipe:
        case OfflineRecipe():
            return {"policy": pools.policy}
        case GrpoRecipe():
            reference = {"reference": pools.reference} if recipe.algorithm.beta > 0 else {}
            critic = {"critic": pools.critic} if pools.critic is not None else {}
            return {"policy": pools.policy, **critic, **reference, "reward": pools.reward, "rollout": pools.rollout}


def first_pools(recipe: Recipe) -> dict[str, PoolConfig]:
    """What a run needs to begin: of replicas that come and go, the fewest."""
    pools = used_pools(recipe)
    if "rollout" in pools:
        pools["rollout"] = pools["rollout"].model_copy(update={"num_workers": recipe.pools.rollout.least})
    return pools
