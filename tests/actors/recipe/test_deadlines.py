"""A deadline is longer than those inside of it, and a stall is told long before a whole queue could be late."""

import pytest

from actors.recipe.deadlines import group_timeout_s, score_timeout_s, stall_parts_s, stall_timeout_s
from actors.recipe.file import load_recipe
from actors.recipe.rewards import CANCEL_GRACE_S, LOAD_TIMEOUT_S
from actors.recipe.schema import GrpoRecipe


def recipe(*overrides: str) -> GrpoRecipe:
    found = load_recipe("recipes/demo.yaml", ["staleness.pipeline_depth=null", *overrides])
    assert isinstance(found, GrpoRecipe)
    return found


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("num_groups", [4, 64])
def test_each_deadline_has_room_for_those_inside(beta: float, num_groups: int) -> None:
    of = recipe(f"algorithm.beta={beta}", f"groups_per_batch={num_groups}", "rewards.timeout_s=90")
    inside = of.generation.timeout_s + len(of.rewards.functions) * (90 + LOAD_TIMEOUT_S)
    assert group_timeout_s(of) > of.generation.timeout_s + score_timeout_s(of)
    assert stall_timeout_s(of) > inside + of.liveness.every_s + of.liveness.timeout_s
    assert stall_timeout_s(of) < group_timeout_s(of), "of groups that queue one finishes after the other"


def test_a_stall_is_told_as_soon_however_many_groups_queue() -> None:
    few, many = recipe("groups_per_batch=4"), recipe("groups_per_batch=256")
    assert stall_timeout_s(few) == stall_timeout_s(many)
    assert group_timeout_s(few) < group_timeout_s(many)


def test_a_reward_model_may_take_its_time_to_be_loaded_again() -> None:
    """Its process was killed at the deadline of a call: the next group waits until there is another that has loaded."""
    of = recipe("rewards.timeout_s=1", "liveness.every_s=1", "liveness.timeout_s=1")
    again_s = len(of.rewards.functions) * (LOAD_TIMEOUT_S + 1)
    assert score_timeout_s(of) > again_s
    assert stall_timeout_s(of) > of.generation.timeout_s + again_s
    assert stall_timeout_s(of) == sum(stall_parts_s(of).values())


def test_a_call_that_others_may_take_with_them_has_time_to_be_made_again_alone() -> None:
    """The process ends under all at the last moment, is made anew, and the same happens to the first that is alone."""
    one, many = recipe("rewards.max_concurrent_groups=1"), recipe("rewards.max_concurrent_groups=64")
    again_s = LOAD_TIMEOUT_S + many.rewards.timeout_s + CANCEL_GRACE_S
    assert stall_timeout_s(many) == stall_timeout_s(one) + again_s
    num_groups = many.max_groups_in_flight  # all at the one worker
    assert score_timeout_s(many) >= score_timeout_s(one) + num_groups * again_s
    assert score_timeout_s(recipe("rewards.max_concurrent_groups=65")) > score_timeout_s(many)


def test_a_model_is_never_called_with_others() -> None:
    of = recipe("rewards.functions=[{model: runs/a/model}]")
    assert stall_timeout_s(of) == stall_timeout_s(recipe("rewards.max_concurrent_groups=1"))


def test_what_the_recipe_says_counts() -> None:
    assert stall_timeout_s(recipe("stall.timeout_s=12.5")) == 12.5
