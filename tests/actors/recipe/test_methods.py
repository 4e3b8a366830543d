"""Whole rollouts that are sampled from a part of the distribution look off policy, the longer the more; and no run is
warned of what its method does not have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.recipe.file import RecipeError, load_recipe, load_stored
from actors.recipe.schema import GrpoRecipe
from algorithms.config import GrpoConfig
from algorithms.losses import Normalizer, grpo_loss
from tests.algorithms.methods.test_parity import RECIPES

TOP_P = "generation.top_p=0.95"
BY_TOKENS = "algorithm.vllm_importance_sampling_mode=token_truncate"
KEPT, LENGTH = 0.95, 64
"""Share of the distribution that is sampled from, and tokens of each of two rollouts."""


def gradient(**keys: Any) -> tuple[float, float]:
    """On policy, of a rewarded rollout and of a punished one."""
    logprobs_N = torch.full((2 * LENGTH,), -1.0, dtype=torch.float64, requires_grad=True)
    recorded_N = logprobs_N.detach() - torch.tensor(KEPT).log()
    sequence_N = torch.arange(2).repeat_interleave(LENGTH)
    advantages_N = torch.tensor([1.0, -1.0])[sequence_N]
    loss, _ = grpo_loss(
        logprobs_N,
        torch.zeros(2 * LENGTH),
        recorded_N,
        None,
        advantages_N,
        sequence_N,
        num_sequences=2,
        config=GrpoConfig(**keys),
        normalizer=Normalizer(2, 2 * LENGTH, LENGTH, 1),
    )
    (gradient_N,) = torch.autograd.grad(loss, logprobs_N)
    rewarded, punished = (2 * part_L.abs().sum().item() for part_L in gradient_N.split(LENGTH))
    return rewarded, punished


def test_weights_of_whole_rollouts_leave_nothing_to_learn() -> None:
    """Of tokens they leave nearly all, and GSPO learns of nothing but rewards: what is refused, and what is not."""
    assert gradient() == pytest.approx((KEPT**LENGTH,) * 2)
    assert gradient(vllm_importance_sampling_mode="token_truncate") == pytest.approx((KEPT,) * 2)
    bypass = {"old_logprobs": "sampled", "vllm_importance_sampling_correction": False}
    assert gradient(**bypass) == pytest.approx((KEPT,) * 2)
    gspo = gradient(**bypass, importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4, loss_type="grpo")
    assert gspo == pytest.approx((KEPT, 0.0))


@pytest.mark.parametrize("name", ["gspo", "rloo"])
def test_ratios_of_whole_rollouts_want_whole_distributions(name: str) -> None:
    with pytest.raises(RecipeError, match=r"generation\.top_p: 0\.95 .*_level 'sequence.*'; set top_p to 1"):
        load_recipe(str(RECIPES[name]), [TOP_P])


def test_a_geometric_mask_has_room_for_what_is_left_out() -> None:
    demo = ["recipes/demo.yaml", [TOP_P, BY_TOKENS, "algorithm.geometric_mask_range=[0.99, 1.01]"]]
    with pytest.raises(
        RecipeError, match=r"geometric_mask_range \[0\.99, 1\.01\]; set top_p to 1, or its lower bound to 0\.95"
    ):
        load_recipe(*demo)
    load_recipe(demo[0], [*demo[1], "algorithm.geometric_mask_range=[0.95, 1.01]"])
    with pytest.raises(RecipeError, match="its lower bound to 0 or less"):
        load_recipe(demo[0], [BY_TOKENS, "generation.top_k=50", "algorithm.geometric_mask_range=[0.95, 1.01]"])


@pytest.mark.parametrize("name", ["gkd", "online_dpo"])
def test_losses_that_read_no_recorded_log_probabilities_take_any(name: str) -> None:
    load_recipe(str(RECIPES[name]), [TOP_P, "generation.top_k=50"])


@pytest.mark.parametrize("name", ["grpo", "dapo", "icepop", "ppo", "decoupled_ppo_interpolated"])
def test_and_so_do_those_that_weigh_tokens(name: str) -> None:
    load_recipe(str(RECIPES[name]), [TOP_P])


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("recipes/methods/gspo.yaml", "temperature: 1.3", "temperature: 1.3, top_p: 0.95"),
        ("recipes/methods/icepop.yaml", "clip_min: 0.5", "clip_min: 1.5"),
        ("recipes/methods/ppo.yaml", "cliprange_value: 0.2", "warmup_steps: 60"),
        ("recipes/offline/dpo.yaml", "beta: 0.1", "discopop_tau: 0.1"),
        ("recipes/offline/cpo.yaml", "beta: 0.1", "simpo_gamma: 1.0"),
    ],
)
def test_a_run_that_has_begun_so_can_still_be_read(path: str, old: str, new: str, tmp_path: Path) -> None:
    text = Path(path).read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace(old, new))
    assert recipe.read_text() != text
    load_stored(recipe)
    with pytest.raises(RecipeError):
        load_recipe(recipe)


ALL = ("zero_std", "off_policy", "entropy", "length", "idle", "idle")


@pytest.mark.parametrize(
    ("name", "override", "without"),
    [
        ("grpo", "steps=60", ()),
        ("decoupled_ppo", "steps=60", ()),
        # Of a loss of its own no probability ratio is measured, which would count as the worst of all.
        ("gkd", "steps=60", ("zero_std", "off_policy", "length")),
        ("gkd", "rewards.functions.0.weight=1.0", ("zero_std", "off_policy", "length")),
        # A judge's rewards are as high at the end as at the beginning.
        ("online_dpo", "steps=60", ("off_policy", "length")),
        # Rewards that are only measured are all equal, and do not grow.
        ("on_policy_distillation", "steps=60", ("zero_std", "length")),
        ("on_policy_distillation", "rewards.functions.0.weight=1.0", ()),
        # Equal rewards say something where no group is the baseline.
        ("ppo", "steps=60", ("zero_std",)),
        ("reinforce_plus_plus", "steps=60", ("zero_std",)),
        ("reinforce_plus_plus_baseline", "steps=60", ()),
    ],
)
def test_rules_of_health_are_those_that_the_method_can_break(
    name: str, override: str, without: tuple[str, ...]
) -> None:
    recipe = load_recipe(str(RECIPES[name]), [override])
    assert isinstance(recipe, GrpoRecipe)
    kinds = [rule.kind for rule in recipe.watched_health.rules]
    assert kinds == [kind for kind in ALL if kind not in without]
    assert recipe.watched_health.model_copy(update={"rules": recipe.health.rules}) == recipe.health
