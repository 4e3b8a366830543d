"""Methods that do not train on GRPO's loss: each recipe's loss, gathered from its micro-batches, is TRL's.

docs/algorithms.md states the differences that were measured; they are upper bounds here.

Legend: B = sequences, C = longest completion, V = vocabulary.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe
from algorithms.divergence import Head, head_divergence
from algorithms.gkd import token_weights
from algorithms.preference.config import OnlineDpoConfig
from algorithms.preference.online import PlacedPair, pair_weights, sampled_pairs
from algorithms.preference.weigh import weighted_sum
from algorithms.types import GroupSummary
from tests.algorithms.methods.test_parity import OWN_LOSS, RECIPES, SPLITS, stated

VOCABULARY, HIDDEN = 37, 6
LENGTHS = (5, 1, 7, 3, 2, 9, 4, 6)
"""Of four samples of the student and four completions of the data."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recipe_of(name: str) -> GrpoRecipe:
    recipe = load_recipe(str(RECIPES[name]))
    assert isinstance(recipe, GrpoRecipe)
    return recipe


def test_these_are_all_of_them() -> None:
    recipes = {name: recipe_of(name) for name in RECIPES}
    own = {name for name, recipe in recipes.items() if recipe.distillation or recipe.online_dpo}
    assert own == OWN_LOSS


@pytest.mark.parametrize("lmbda", [0.5, 0.2])
@pytest.mark.parametrize("micro_batches", SPLITS, ids=["one", "three", "eight"])
def test_gkd_is_trls_on_samples_and_on_data(micro_batches: tuple[range, ...], lmbda: float) -> None:
    """What TRL's coin gives on average: lmbda x its loss on the samples + (1 - lmbda) x its loss on the data."""
    config = recipe_of("gkd").distillation
    assert config is not None
    torch.manual_seed(1)
    hidden_B = [torch.randn(length, HIDDEN) for length in LENGTHS]
    teachers_B = [torch.randn(length, HIDDEN) for length in LENGTHS]
    student_VH, teacher_VH = torch.randn(2, VOCABULARY, HIDDEN)
    student_VH.requires_grad_()

    weights = token_weights(LENGTHS[:4], LENGTHS[4:], lmbda)
    ours = torch.zeros(())
    for rows in micro_batches:
        student = Head(torch.cat([hidden_B[row] for row in rows]), student_VH)
        teacher = Head(torch.cat([teachers_B[row] for row in rows]), teacher_VH)
        values_N, entropy_N = head_divergence(student, teacher, config.beta, config.temperature)
        weights_N = torch.cat([torch.full((LENGTHS[row],), weights[row >= 4]) for row in rows])
        ours = ours + weighted_sum(values_N, entropy_N, weights_N)[0]

    def theirs(rows: range) -> Tensor:
        logits = [torch.cat([states[row] for row in rows])[None] for states in (hidden_B, teachers_B)]
        return GKDTrainer.generalized_jsd_loss(
            logits[0] @ student_VH.T, logits[1] @ teacher_VH.T, beta=config.beta, num_items_in_batch=logits[0].shape[1]
        )

    expected = lmbda * theirs(range(4)) + (1 - lmbda) * theirs(range(4, 8))
    bound = stated("gkd", "TRL")
    assert abs(ours.item() - expected.item()) <= bound
    gradients = [torch.autograd.grad(loss, student_VH)[0] for loss in (ours, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() <= bound


def test_without_data_the_samples_are_all() -> None:
    assert token_weights((3, 5), (), 0.4) == (1 / 8, 0.0)
    assert token_weights((), (4,), 0.4) == (0.4, 0.6 / 4), "nothing sampled: nothing of it weighs"


CHOSEN_FIRST = (True, False, True, True)
"""Of each pair of completions, whether the judge prefers the first."""


def trl_online_dpo(
    logits_BCV: Tensor, reference_BCV: Tensor, ids_BC: Tensor, mask_BC: Tensor, loss_type: str
) -> Tensor:
    """TRL's own training step on completions and rewards that are given; it hands its loss to `backward`."""
    caught: list[Tensor] = []
    prompts = ["p"] * 4
    tables = {"model": logits_BCV, "reference": reference_BCV}
    stand_in = SimpleNamespace(
        args=SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            n_gpu=1,
            optim=None,
            torch_empty_cache_steps=None,
            gradient_accumulation_steps=1,
        ),
        state=SimpleNamespace(global_step=1),
        beta=0.1,
        eos_token_ids=[0],
        ref_model="reference",
        reward_funcs=[None],
        stats=defaultdict(list),
        processing_class=SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["c"] * len(ids)),
        accelerator=SimpleNamespace(gather_for_metrics=lambda tensor: tensor, backward=caught.append),
        _generate=lambda model, prompts, images: (ids_BC[:, :1], mask_BC[:, :1], ids_BC, mask_BC, None),
        _calculate_rewards_from_functions=lambda **_: torch.tensor(
            [float(first) for first in CHOSEN_FIRST] + [float(not first) for first in CHOSEN_FIRST]
        ),
        _forward=lambda model, *_: (
            (tables["reference"] if model == "reference" else tables["model"])
            .log_softmax(-1)
            .gather(-1, ids_BC[..., None])[..., 0]
        ),
    )
    OnlineDPOTrainer.training_step(stand_in, SimpleNamespace(train=lambda: None), {"prompt": prompts})
    return caught[0]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("micro_batches", SPLITS, ids=["one", "three", "eight"])
def test_online_dpo_is_trls(micro_batches: tuple[range, ...], loss_type: Literal["sigmoid", "ipo"]) -> None:
    """The completions of prompt n are sequences n and n + 4, as TRL lays them out; ours are rollouts 0 and 1."""
    torch.manual_seed(2)
    longest = max(LENGTHS)
    ids_BC = torch.randint(1, VOCABULARY, (8, longest))
    mask_BC = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).long()
    reference_BCV = torch.randn(8, longest, VOCABULARY)
    logits_BCV = (reference_BCV + 0.5 * torch.randn(8, longest, VOCABULARY)).requires_grad_()

    def sums(table_BCV: Tensor) -> Tensor:
        return (table_BCV.log_softmax(-1).gather(-1, ids_BC[..., None])[..., 0] * mask_BC).sum(1)

    summaries = [_judged(prompt, CHOSEN_FIRST[prompt]) for prompt in range(4)]
    logprobs, reference, tokens = (
        {(row % 4, row // 4): float(values[row]) for row in range(8)}
        for values in (sums(logits_BCV).tolist(), sums(reference_BCV).tolist(), LENGTHS)
    )
    weights, metrics = pair_weights(
        sampled_pairs(summaries, False),
        logprobs,
        reference,
        tokens,
        OnlineDpoConfig(loss_type=loss_type),
        0.1,  # type: ignore[arg-type]
    )
    share = torch.zeros(())
    for rows in micro_batches:
        for row in rows:
            values_N = logits_BCV[row].log_softmax(-1).gather(-1, ids_BC[row][:, None])[: LENGTHS[row], 0]
            weights_N = torch.full_like(values_N, weights[row % 4, row // 4])
            share = share + weighted_sum(values_N, torch.zeros_like(values_N), weights_N)[0]
    expected = trl_online_dpo(logits_BCV, reference_BCV, ids_BC, mask_BC, loss_type)
    bound = stated("online_dpo", "TRL")
    assert abs(metrics["loss"] - expected.item()) <= bound
    gradients = [torch.autograd.grad(loss, logits_BCV)[0] for loss in (share, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() <= bound


def _judged(prompt: int, first: bool | None, rewards: tuple[float | None, ...] | None = None) -> GroupSummary:
    rewards = rewards or (None if first is None else float(first), None if first is None else float(not first))
    size = len(rewards)
    return GroupSummary(
        prompt, 0, 0, 0, (9,) * size, (4,) * size, 5, (False,) * size, ({0: 4},) * size, rewards, {}, {}, 0.0, 0.0
    )


def test_best_and_worst_are_a_pair_and_ties_are_none() -> None:
    groups = [
        _judged(0, None, (0.5, 2.0, -1.0, 2.0)),
        _judged(1, None, (1.0, 1.0)),
        _judged(2, None, (None, 3.0, None, 1.0)),
        _judged(3, None, (None, 3.0)),
        _judged(4, None),
    ]
    assert sampled_pairs(groups, False) == [PlacedPair(0, 1, 2), PlacedPair(2, 1, 3)]
    truncated = dataclasses.replace(groups[0], truncated_G=(False, True, True, False))
    assert sampled_pairs([truncated], True) == [PlacedPair(0, 3, 0)]
    assert pair_weights([], {}, {}, {}, OnlineDpoConfig(), 0.1) == ({}, {"loss": 0.0, "pairs": 0.0})
