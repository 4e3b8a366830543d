"""A critic and its pool come with GAE and never without; what the recipe does not say of it is as the policy's is."""

from pathlib import Path

import pytest

from actors.recipe.file import RecipeError, load_recipe
from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe
from actors.settings import ModelSource, critic_settings, policy_settings

ROOT = Path(__file__).parents[3]
PPO, GRPO, SFT = (str(ROOT / f"recipes/{name}.yaml") for name in ("methods/ppo", "methods/grpo", "demo_sft"))


@pytest.mark.parametrize(
    ("path", "override", "message"),
    [
        (PPO, "pools.critic=null", "pools.critic: algorithm.advantage 'gae' trains a critic, and it has no pool"),
        (PPO, "pools.critic.gpus_per_worker=2", "pools.critic.gpus_per_worker: 2, but each critic worker drives one"),
        (PPO, "critic.model={kind: tiny}", "critic.model"),
        (PPO, "critic.cliprange_value=0", "critic.cliprange_value"),
        (PPO, "critic.sequence_parallel_size=2", "critic.sequence_parallel_size: 1 ranks make no teams of 2"),
        (
            PPO,
            "policy={offload: {parameters: cpu}, zero_stage: 3}",
            "critic.zero_stage: policy.offload holds for the critic, too",
        ),
        (PPO, "critic.warmup_steps=60", "critic.warmup_steps: 60 are all steps of the run, so the policy"),
        (GRPO, "pools.critic.num_workers=1", "pools.critic: nobody asks a critic"),
        (GRPO, "critic.learning_rate=1e-5", "critic: nobody asks a critic"),
        (
            SFT,
            "pools.critic.num_workers=1",
            "pools.critic: only algorithm.advantage 'gae' of recipes of kind 'grpo' has a critic",
        ),
    ],
)
def test_what_cannot_work_is_refused(path: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, [override])
    assert message in str(error.value)


def ppo(*overrides: str) -> GrpoRecipe:
    recipe = load_recipe(PPO, overrides)
    assert isinstance(recipe, GrpoRecipe)
    return recipe


def test_the_critic_has_a_pool_and_no_other_run_has() -> None:
    assert list(used_pools(ppo())) == ["policy", "critic", "reward", "rollout"]
    assert "critic" not in used_pools(load_recipe(GRPO))


def test_a_critic_is_as_the_policy_but_for_what_is_said_of_it() -> None:
    recipe = ppo(
        "critic.zero_stage=2", "critic.dtype=bfloat16", "pools.critic.num_workers=3", "optimizer.weight_decay=0.1",
        "policy={lora: {r: 4}, max_tokens_per_micro_batch: 64}", "algorithm.num_iterations=2",
        "critic.sequence_parallel_size=3",
    )  # fmt: skip
    policy, critic = (each(recipe, ModelSource("m"), Path("run")) for each in (policy_settings, critic_settings))
    assert (policy.num_ranks, critic.num_ranks) == (1, 3)
    assert (critic.policy.zero_stage, critic.policy.dtype, critic.policy.lora) == (2, "bfloat16", None)
    assert critic.policy.max_tokens_per_micro_batch == 64
    assert (policy.policy.sequence_parallel_size, critic.policy.sequence_parallel_size) == (1, 3)
    assert (critic.optimizer.learning_rate, policy.optimizer.learning_rate) == (5e-4, 2e-4)
    assert critic.optimizer.weight_decay == 0.1
    assert critic.model_path == policy.model_path == "m"
    assert (critic.objective.numbers, critic.objective.cliprange_value) == ("values", 0.2)
    assert critic.objective.num_iterations == 2


def test_a_critic_may_begin_with_a_model_of_its_own(tmp_path: Path) -> None:
    recipe = ppo(f"critic.model={{kind: pretrained, path: {tmp_path}}}")
    assert critic_settings(recipe, ModelSource("m"), Path("run")).model_path == str(tmp_path)


def test_without_a_word_a_critic_has_defaults() -> None:
    recipe = ppo("critic=null")
    assert critic_settings(recipe, ModelSource("m"), Path("run")).optimizer.learning_rate == 1e-5
