"""A pool is placed iff the recipe has work for it."""

from actors.recipe.base import OfflineRecipe
from actors.recipe.schema import GrpoRecipe, Recipe
from placement.config import PoolConfig


def used_pools(recipe: Recipe) -> dict[str, PoolConfig]:
    """The pools that a run of the recipe starts; no KL penalty, no reference; nor where it is below an adapter."""
    pools = recipe.pools
    match recipe:
        case OfflineRecipe():
            return {"policy": pools.policy}
        case GrpoRecipe():
            reference = {"reference": pools.reference} if recipe.has_reference_workers else {}
            return {"policy": pools.policy, **reference, "reward": pools.reward, "rollout": pools.rollout}
