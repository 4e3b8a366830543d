"""Deadlines that follow from others: each is longer than those inside of it, which name the cause better."""

from actors.recipe.rewards import CANCEL_GRACE_S, LOAD_TIMEOUT_S
from actors.recipe.schema import GrpoRecipe

_SLACK_S = 60.0


def score_timeout_s(recipe: GrpoRecipe) -> float:
    """Every reward function loaded again and up to its deadline; before it all groups that may queue for the worker.

    They count one after another however many a worker scores at one time: sync functions go in turn, and so do async
    ones when each ends the process that it is called in (actors/rewards/docket.py). When they hold the process, so that
    others are late, fewer are called together each time, until it is one. A worker that hangs, and is found out and
    started again meanwhile, has time for it, too.
    """
    queue = -(-recipe.max_groups_in_flight // recipe.pools.reward.num_workers)
    reference_s = recipe.policy.timeout_s if recipe.has_reference_workers else 0.0
    num_halvings = (recipe.rewards.max_concurrent_groups - 1).bit_length()
    late_s = num_halvings * (recipe.rewards.timeout_s + CANCEL_GRACE_S)
    return _SLACK_S + _found_out_s(recipe) + queue * _rewards_s(recipe) + late_s + reference_s


def group_timeout_s(recipe: GrpoRecipe) -> float:
    """Of one group, generation, reference and rewards: longer than the deadlines that the replica itself keeps."""
    return _SLACK_S + recipe.generation.timeout_s + score_timeout_s(recipe)


def stall_timeout_s(recipe: GrpoRecipe) -> float:
    """How long no group at all may finish while the policy waits.

    It need not be as long as a group may take: of the groups that queue for a worker one finishes after the other. So
    it is the time of one, sampled and scored alone, and of a worker that is found to hang; the watchdog waits for
    workers that are being started (actors/run/watchdog.py). The reference, which looks once at what was sampled token
    by token, takes no longer than that.
    """
    return recipe.stall.timeout_s or sum(stall_parts_s(recipe).values())


def stall_parts_s(recipe: GrpoRecipe) -> dict[str, float]:
    """What the stall's own deadline is the sum of."""
    parts = {"generation": recipe.generation.timeout_s}
    if recipe.has_reference_workers:
        parts["the reference"] = recipe.generation.timeout_s
    calls_s = _num_calls(recipe) * (recipe.rewards.timeout_s + CANCEL_GRACE_S)
    parts |= {"rewards": calls_s, "loading them again": _rewards_s(recipe) - calls_s}
    return parts | {"finding out a worker that hangs": _found_out_s(recipe), "slack": _SLACK_S}


def _found_out_s(recipe: GrpoRecipe) -> float:
    return recipe.liveness.every_s + recipe.liveness.timeout_s


def _num_calls(recipe: GrpoRecipe) -> int:
    """Of one group, at most: of each function, and once more of all async ones, alone, when the process has ended under
    them and others. Which are async is not known before they are loaded; a model is not."""
    rewards = recipe.rewards
    may_be_async = any(function.model is None for function in rewards.functions)
    return len(rewards.functions) + (may_be_async and rewards.max_concurrent_groups > 1)


def _rewards_s(recipe: GrpoRecipe) -> float:
    """Of one group: each call is killed at its deadline, and then all functions are loaded again for the next one."""
    return _num_calls(recipe) * (LOAD_TIMEOUT_S + recipe.rewards.timeout_s + CANCEL_GRACE_S)
