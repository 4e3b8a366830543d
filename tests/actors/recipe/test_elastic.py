"""What a range of rollout replicas means for the rest of a recipe."""

from pathlib import Path

import pytest

from actors.recipe.deadlines import score_timeout_s
from actors.recipe.file import load_recipe
from actors.recipe.pools import fewer_pools, first_pools, used_pools
from actors.recipe.schema import GrpoRecipe

DEMO = str(Path(__file__).parents[3] / "recipes" / "demo.yaml")


def demo(*overrides: str) -> GrpoRecipe:
    recipe = load_recipe(DEMO, [*overrides, "staleness.pipeline_depth=64", "rollout.max_groups_per_replica=4"])
    assert isinstance(recipe, GrpoRecipe)
    return recipe


def test_a_run_begins_with_the_fewest_replicas_and_may_fill_the_most() -> None:
    fixed = demo("pools.rollout.num_workers=3")
    recipe = demo("pools.rollout.num_workers=3", "pools.rollout.min_workers=2", "pools.rollout.max_workers=8")
    assert first_pools(recipe)["rollout"].num_workers == 2
    assert used_pools(recipe)["rollout"].num_workers == 3
    assert first_pools(fixed) == used_pools(fixed)
    assert [recipe.groups_in_flight(count) for count in (0, 2, 8, 20)] == [0, 8, 32, 64]
    assert (fixed.max_groups_in_flight, recipe.max_groups_in_flight) == (12, 32)


@pytest.mark.parametrize(("least", "fewer"), [(9, []), (8, [8]), (6, [8, 7, 6])])
def test_where_there_is_no_room_for_all_fewer_are_tried_and_the_fewest_last(least: int, fewer: list[int]) -> None:
    recipe = demo("pools.rollout.num_workers=9", f"pools.rollout.min_workers={least}", "pools.rollout.max_workers=9")
    assert [pools["rollout"].num_workers for pools in fewer_pools(recipe)] == fewer


def test_deadlines_allow_for_the_most_replicas_and_for_machines_that_have_to_come() -> None:
    fixed, recipe = demo(), demo("pools.rollout.max_workers=8", "rollout.capacity_timeout_s=900")
    assert score_timeout_s(recipe) > score_timeout_s(fixed)
    assert fixed.replica_timeout_s == fixed.rollout.start_timeout_s
    assert recipe.replica_timeout_s == recipe.rollout.start_timeout_s + 900


def test_a_replica_that_lies_with_a_critic_may_have_to_wait_for_it() -> None:
    shared = demo("pools.rollout.colocate_with=policy", "policy.timeout_s=700")
    assert shared.replica_timeout_s == shared.rollout.start_timeout_s
    with_critic = shared.model_copy(update={"pools": shared.pools.model_copy(update={"critic": shared.pools.policy})})
    assert with_critic.replica_timeout_s == shared.rollout.start_timeout_s + 700


@pytest.mark.parametrize("pool", ["policy", "reward", "reference"])
def test_no_other_pool_has_a_range(pool: str) -> None:
    with pytest.raises(ValueError, match=rf"pools.{pool}.max_workers: unknown key"):
        demo(f"pools.{pool}.max_workers=2")
