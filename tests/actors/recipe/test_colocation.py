"""What it means for the rest of a recipe that replicas lie with the policy; every refusal names key, file and fix."""

from pathlib import Path

import pytest

from actors.policy_calls import ModelSource
from actors.recipe.file import RecipeError, load_recipe
from actors.recipe.schema import GrpoRecipe
from actors.settings import policy_settings, rollout_settings

SHARED = str(Path(__file__).parents[3] / "recipes" / "qwen2.5_1.5b_colocated.yaml")
DEMO = str(Path(__file__).parents[3] / "recipes" / "demo.yaml")


def recipe(path: str, *overrides: str) -> GrpoRecipe:
    found = load_recipe(path, overrides)
    assert isinstance(found, GrpoRecipe)
    return found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("sync.transport=nccl",),
            "sync.transport: nccl takes no two workers on one GPU, and pools.rollout.colocate_with puts the replicas "
            "on the policy's; set sync.transport to gloo",
        ),
        (
            ("pools.rollout.max_workers=9",),
            "pools.rollout.colocate_with: replicas that come and go need places of their own",
        ),
        (
            ("pools.rollout.gpus_per_worker=3",),
            "pools.rollout.gpus_per_worker: 3 does not divide the policy's 8 x 1 GPUs evenly",
        ),
        (("pools.policy.colocate_with=rollout",), "pools.policy.colocate_with: the policy's GPUs are those that"),
    ],
)
def test_what_cannot_share_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        recipe(SHARED, *overrides)
    assert message in str(refusal.value)


def test_workers_are_told_that_they_share() -> None:
    model = ModelSource("m")
    shared, own = recipe(SHARED), recipe(SHARED, "pools.rollout.colocate_with=null")
    assert policy_settings(shared, model, Path()).shares_gpu
    assert rollout_settings(shared, model).shares
    assert not policy_settings(own, model, Path()).shares_gpu
    assert not rollout_settings(own, model).shares
    laptop = recipe(DEMO, "pools.rollout.colocate_with=policy")
    assert not policy_settings(laptop, model, Path()).shares_gpu, "it has no GPU whose memory it could leave"
    assert rollout_settings(laptop, model).shares
