"""Methods of another loss than GRPO's: each recipe's, gathered from its micro-batches, is TRL's and the paper's.

docs/algorithms.md states the differences that were measured; they are upper bounds here.

Legend: B = sequences, C = longest completion, V = vocabulary.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe
from algorithms.divergence import Head, head_divergence
from algorithms.gkd import DistillationConfig, token_weights
from algorithms.preference.config import OnlineDpoConfig
from algorithms.preference.online import PlacedPair, pair_weights, sampled_pairs
from algorithms.preference.weigh import weighted_sum
from algorithms.types import GroupSummary
from tests.algorithms.methods import papers_own_losses
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


@dataclasses.dataclass(frozen=True)
class Taught:
    """Hidden states of eight sequences, the first four sampled by the student, and two heads over a vocabulary."""

    hidden_B: list[Tensor]
    teachers_B: list[Tensor]
    student_VH: Tensor
    teacher_VH: Tensor


def taught(lengths: Sequence[int]) -> Taught:
    torch.manual_seed(1)
    hidden_B = [torch.randn(length, HIDDEN) for length in lengths]
    teachers_B = [torch.randn(length, HIDDEN) for length in lengths]
    student_VH, teacher_VH = torch.randn(2, VOCABULARY, HIDDEN)
    return Taught(hidden_B, teachers_B, student_VH.requires_grad_(), teacher_VH)


def our_gkd(
    case: Taught, lengths: Sequence[int], config: DistillationConfig, micro_batches: tuple[range, ...]
) -> Tensor:
    weights = token_weights(lengths[:4], lengths[4:], config.lmbda)
    ours = torch.zeros(())
    for rows in micro_batches:
        student = Head(torch.cat([case.hidden_B[row] for row in rows]), case.student_VH)
        teacher = Head(torch.cat([case.teachers_B[row] for row in rows]), case.teacher_VH)
        values_N, entropy_N = head_divergence(student, teacher, config.beta, config.temperature)
        weights_N = torch.cat([torch.full((lengths[row],), weights[row >= 4]) for row in rows])
        ours = ours + weighted_sum(values_N, entropy_N, weights_N)[0]
    return ours


def gkd_config(**changes: float) -> DistillationConfig:
    config = recipe_of("gkd").distillation
    assert config is not None
    return config.model_copy(update=changes)


def within(bound: float, ours: Tensor, expected: Tensor, by: Tensor) -> None:
    assert abs(ours.item() - expected.item()) <= bound
    gradients = [torch.autograd.grad(loss, by, retain_graph=True)[0] for loss in (ours, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() <= bound


@pytest.mark.parametrize("lmbda", [0.5, 0.2])
@pytest.mark.parametrize("micro_batches", SPLITS, ids=["one", "three", "eight"])
def test_gkd_is_trls_on_samples_and_on_data(micro_batches: tuple[range, ...], lmbda: float) -> None:
    """What TRL's coin gives on average: lmbda x its loss on the samples + (1 - lmbda) x its loss on the data."""
    config, case = gkd_config(lmbda=lmbda), taught(LENGTHS)

    def theirs(rows: range) -> Tensor:
        logits = [torch.cat([states[row] for row in rows])[None] for states in (case.hidden_B, case.teachers_B)]
        return GKDTrainer.generalized_jsd_loss(
            logits[0] @ case.student_VH.T,
            logits[1] @ case.teacher_VH.T,
            beta=config.beta,
            num_items_in_batch=logits[0].shape[1],
        )

    expected = lmbda * theirs(range(4)) + (1 - lmbda) * theirs(range(4, 8))
    within(stated("gkd", "TRL"), our_gkd(case, LENGTHS, config, micro_batches), expected, case.student_VH)


@pytest.mark.parametrize(("beta", "lmbda"), [(0.5, 0.5), (0.1, 0.2)])
def test_gkd_is_the_papers(beta: float, lmbda: float) -> None:
    """Of completions that are all as long: the paper averages over each first, TRL and we over all tokens at once."""
    lengths = (3,) * 8
    config, case = gkd_config(lmbda=lmbda, beta=beta), taught(lengths)

    def distributions(states_TH: Tensor, head_VH: Tensor) -> list[list[Tensor]]:
        return [papers_own_losses.probabilities(logits_V) for logits_V in states_TH @ head_VH.T]

    sequences = [
        (distributions(case.teachers_B[row], case.teacher_VH), distributions(case.hidden_B[row], case.student_VH))
        for row in range(8)
    ]
    expected = papers_own_losses.gkd(sequences[:4], sequences[4:], beta, lmbda)
    for micro_batches in SPLITS:
        within(stated("gkd", "paper"), our_gkd(case, lengths, config, micro_batches), expected, case.student_VH)


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


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Two completions of each of four prompts: those of prompt n are sequences n and n + 4, as TRL lays them out."""

    ids_BC: Tensor
    mask_BC: Tensor
    reference_BCV: Tensor
    logits_BCV: Tensor

    def sums(self, table_BCV: Tensor) -> list[float]:
        logprobs_BC = table_BCV.log_softmax(-1).gather(-1, self.ids_BC[..., None])[..., 0]
        return [float(value) for value in (logprobs_BC * self.mask_BC).sum(1).detach()]


def sampled() -> Sampled:
    torch.manual_seed(2)
    longest = max(LENGTHS)
    ids_BC = torch.randint(1, VOCABULARY, (8, longest))
    mask_BC = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).long()
    reference_BCV = torch.randn(8, longest, VOCABULARY)
    logits_BCV = (reference_BCV + 0.5 * torch.randn(8, longest, VOCABULARY)).requires_grad_()
    return Sampled(ids_BC, mask_BC, reference_BCV, logits_BCV)


def our_online_dpo(case: Sampled, micro_batches: tuple[range, ...], loss_type: Any) -> tuple[float, Tensor]:
    """The loss, and the sum that is differentiated for it; rollouts 0 and 1 of a group are a prompt's."""
    summaries = [_judged(prompt, CHOSEN_FIRST[prompt]) for prompt in range(4)]
    logprobs, reference, tokens = (
        {(row % 4, row // 4): values[row] for row in range(8)}
        for values in (case.sums(case.logits_BCV), case.sums(case.reference_BCV), LENGTHS)
    )
    config = OnlineDpoConfig(loss_type=loss_type)
    weights, metrics = pair_weights(sampled_pairs(summaries, False), logprobs, reference, tokens, config, 0.1)
    share = torch.zeros(())
    for rows in micro_batches:
        for row in rows:
            values_N = case.logits_BCV[row].log_softmax(-1).gather(-1, case.ids_BC[row][:, None])[: LENGTHS[row], 0]
            weights_N = torch.full_like(values_N, weights[row % 4, row // 4])
            share = share + weighted_sum(values_N, torch.zeros_like(values_N), weights_N)[0]
    return metrics["loss"], share


@pytest.mark.parametrize("against", ["TRL", "paper"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("micro_batches", SPLITS, ids=["one", "three", "eight"])
def test_online_dpo_is_trls_and_the_papers(micro_batches: tuple[range, ...], loss_type: str, against: str) -> None:
    case = sampled()
    if against == "TRL":
        expected = trl_online_dpo(case.logits_BCV, case.reference_BCV, case.ids_BC, case.mask_BC, loss_type)
    else:
        expected = paper_online_dpo(case, loss_type)
    loss, share = our_online_dpo(case, micro_batches, loss_type)
    bound = stated("online_dpo", against)
    assert abs(loss - expected.item()) <= bound
    gradients = [torch.autograd.grad(each, case.logits_BCV)[0] for each in (share, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() <= bound


def paper_online_dpo(case: Sampled, loss_type: str) -> Tensor:
    better = [prompt if first else prompt + 4 for prompt, first in enumerate(CHOSEN_FIRST)]
    worse = [prompt + 4 if first else prompt for prompt, first in enumerate(CHOSEN_FIRST)]

    def logprobs(table_BCV: Tensor, rows: list[int]) -> list[list[Tensor]]:
        return [
            [papers_own_losses.logprob(table_BCV[row, t], int(case.ids_BC[row, t])) for t in range(LENGTHS[row])]
            for row in rows
        ]

    then = [
        [[value.item() for value in of_row] for of_row in logprobs(case.reference_BCV, rows)]
        for rows in (better, worse)
    ]
    now = [logprobs(case.logits_BCV, rows) for rows in (better, worse)]
    return papers_own_losses.online_dpo(*now, *then, 0.1, loss_type)


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
