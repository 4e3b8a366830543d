"""Every recipe under recipes/methods/ computes its paper's loss and gradient, and TRL's where TRL has the method.

docs/algorithms.md states the differences that were measured; they are upper bounds here.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe
from algorithms.config import GrpoConfig
from tests.algorithms.methods import papers
from tests.algorithms.methods.batch import GROUP_SIZE, LENGTHS, Drifted, drifted, our_loss
from tests.algorithms.methods.peer import METHODS as IN_TRL
from tests.algorithms.methods.peer import trl_loss

ROOT = Path(__file__).parents[3]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes/methods").glob("*.yaml"))}
OWN_LOSS = {"gkd", "online_dpo"}
"""Recipes of another loss than GRPO's: test_own_losses.py."""
SPLITS = [(range(8),), ((0, 5, 2), (7,), (1, 3, 4, 6)), tuple((row,) for row in range(8))]
DRIFTS = (0.03, 0.1, 0.3, 0.6, 1.0)
"""How far the policies are apart, from nearly on policy to where every bound is passed somewhere."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config_of(name: str) -> GrpoConfig:
    """What the recipe says, for groups of the batch's size."""
    recipe = load_recipe(str(RECIPES[name]), [f"algorithm.num_generations={GROUP_SIZE}"])
    assert isinstance(recipe, GrpoRecipe)
    return recipe.algorithm


def paper_loss(batch: Drifted, name: str) -> tuple[float, Tensor]:
    logits_BCV = batch.logits_BCV.clone().requires_grad_()
    loss = papers.METHODS[name](papers.Policies(batch, logits_BCV))
    (gradient_BCV,) = torch.autograd.grad(loss, logits_BCV)
    return loss.item(), gradient_BCV


def stated(name: str, column: str) -> float:
    """The figure in the method's row of docs/algorithms.md."""
    rows = (ROOT / "docs/algorithms.md").read_text().splitlines()
    header = next(row for row in rows if row.startswith("| recipe"))
    place = [cell.strip() for cell in header.split("|")].index(column)
    row = next(row for row in rows if row.startswith(f"| [`{name}`]"))
    (figure,) = re.findall(r"\d+e-\d+", row.split("|")[place])
    return float(figure)


def worst_difference(name: str, reference: Callable[[Drifted], tuple[float, Tensor]], *, stale: bool = True) -> float:
    """In the loss and in any entry of its gradient, over all drifts and cuts into micro-batches."""
    config, worst, largest = config_of(name), 0.0, 0.0
    for seed, drift in enumerate(DRIFTS):
        batch = drifted(seed, drift=drift, stale=stale)
        loss, gradient_BCV = reference(batch)
        largest = max(largest, gradient_BCV.abs().max().item())
        for micro_batches in SPLITS:
            ours, ours_BCV, _ = our_loss(batch, config, micro_batches)
            worst = max(worst, abs(ours - loss), (ours_BCV - gradient_BCV).abs().max().item())
    assert largest > 1e-2, "the comparison must not be of zeros"
    return worst


@pytest.mark.parametrize("name", papers.METHODS)
def test_the_paper_says_so_too(name: str) -> None:
    assert worst_difference(name, lambda batch: paper_loss(batch, name)) <= stated(name, "paper")


@pytest.mark.parametrize("name", IN_TRL)
def test_trl_says_so_too(name: str) -> None:
    config = config_of(name)
    stale = name != "rloo"  # TRL's RLOO knows no other weights than the step's first
    assert worst_difference(name, lambda batch: trl_loss(batch, config)[:2], stale=stale) <= stated(name, "TRL")


@pytest.mark.parametrize("name", IN_TRL)
def test_trl_says_so_in_float32(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    config = config_of(name)
    for seed, drift in enumerate(DRIFTS[:3]):
        batch = drifted(seed, drift=drift, stale=name != "rloo")
        loss, gradient_BCV, _ = trl_loss(batch, config)
        ours, ours_BCV, _ = our_loss(batch, config, SPLITS[1])
        assert ours_BCV.dtype == gradient_BCV.dtype == torch.float32
        assert abs(ours - loss) < 1e-5
        assert (ours_BCV - gradient_BCV).abs().max() < 1e-5


def test_no_two_methods_are_the_same() -> None:
    """What makes a method bites on this batch: without it, it would be another one."""
    batch = drifted(4, drift=0.4)
    gradients = {name: our_loss(batch, config_of(name), [range(8)])[1] for name in papers.METHODS}
    for one, other in itertools.combinations(gradients, 2):
        assert (gradients[one] - gradients[other]).abs().max() > 1e-6, f"{one} and {other}"


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus", "on_policy_distillation"])
def test_a_kl_outside_of_the_loss_is_measured_as_it_is(name: str) -> None:
    batch = drifted(2, drift=0.5)
    _, _, stats = our_loss(batch, config_of(name), [range(8)])
    pi = papers.Policies(batch, batch.logits_BCV).pi
    differences = [batch.reference[i][t] - pi[i][t].item() for i in papers.ROLLOUTS for t in range(LENGTHS[i])]
    k3 = [math.exp(difference) - difference - 1 for difference in differences]
    assert stats.finish()["kl"] == pytest.approx(papers.mean(k3))


@pytest.mark.parametrize("name", ["icepop", "geometric_mask", "off_policy_mask"])
def test_what_masks_reject_is_counted_and_the_rest_weighs_what_it_did(name: str) -> None:
    """The mean is over what there was before: the gradient of a rollout that stays is that without the mask."""
    config = config_of(name)
    unmasked = {"geometric_mask_range": None, "off_policy_mask_threshold": None}
    unmasked |= {"vllm_importance_sampling_clip_min": None, "vllm_importance_sampling_clip_max": None}
    rejected = []
    for seed, drift in enumerate(DRIFTS):
        batch = drifted(seed, drift=drift)
        _, with_BCV, stats = our_loss(batch, config, [range(8)])
        bounds = {} if name == "geometric_mask" else {"vllm_importance_sampling_clip_max": None}
        _, without_BCV, _ = our_loss(batch, config.model_copy(update=unmasked | bounds), [range(8)])
        gone_BC = (with_BCV == 0).all(-1) & (without_BCV != 0).any(-1)
        left_BC = (with_BCV != 0).any(-1)
        assert torch.allclose(with_BCV[left_BC], without_BCV[left_BC], rtol=0, atol=1e-12)
        share = stats.finish()["sampling/rejected"]
        assert share * sum(LENGTHS) >= gone_BC.sum()
        rejected.append(share)
    assert 0.0 in rejected
    assert any(0 < share < 1 for share in rejected)


def test_every_method_has_a_recipe_and_every_recipe_a_paper() -> None:
    assert set(RECIPES) == {*papers.METHODS, "ppo"} | OWN_LOSS  # ppo needs a critic's values besides: test_ppo.py
