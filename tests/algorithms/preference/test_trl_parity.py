"""TRL's preference trainers are the oracle: their own methods run, unbound, on a stand-in that holds what they read.

The model is a table of logits, so that a gradient is compared for every logit, in float64 (ORPO in float32, to which
TRL rounds). Ours goes the whole way: sums per sequence, weights per sequence, and weight x sum per sequence.

Legend: P = pairs, B = 2 P sequences (chosen before rejected), C = longest completion, V = vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOConfig as TrlCpoConfig
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from algorithms.preference.batch import Judged, Pairs
from algorithms.preference.config import (
    DIVERGING,
    SMOOTHED,
    BradleyTerryConfig,
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
)
from algorithms.preference.kto import kl_estimate
from algorithms.preference.weigh import Weighed, weigh_judged, weigh_pairs

VOCABULARY, PROMPT = 11, 1
"""The prompt is one token, which nothing predicts: TRL's ORPO learns the prompt's other tokens, too."""
TOLERANCE = 1e-9
FLOAT32 = 1e-6
"""Of what TRL rounds to float32 on the way."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Case:
    """Completions of ragged lengths under a policy and a reference that differ."""

    ids_BC: Tensor
    mask_BC: Tensor
    logits_BCV: Tensor
    reference_BCV: Tensor

    def logprobs_BC(self, logits_BCV: Tensor) -> Tensor:
        return logits_BCV.log_softmax(-1).gather(-1, self.ids_BC[..., None])[..., 0] * self.mask_BC

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Prompt and completion as TRL's collators lay them out."""
        prompt_B1 = torch.full((len(self.ids_BC), PROMPT), 7)
        return {
            "input_ids": torch.cat([prompt_B1, self.ids_BC], 1),
            "attention_mask": torch.cat([torch.ones_like(prompt_B1), self.mask_BC.long()], 1),
            "completion_mask": torch.cat([torch.zeros_like(prompt_B1), self.mask_BC.long()], 1),
        }


def make_case(seed: int, num_pairs: int = 4) -> Case:
    random = torch.Generator().manual_seed(seed)
    num, longest = 2 * num_pairs, 9
    lengths_B = torch.randint(1, longest + 1, (num,), generator=random)
    lengths_B[0] = longest
    logits_BCV, change_BCV = torch.randn(2, num, longest, VOCABULARY, generator=random)
    return Case(
        ids_BC=torch.randint(0, VOCABULARY, (num, longest), generator=random),
        mask_BC=torch.arange(longest) < lengths_B[:, None],
        logits_BCV=logits_BCV,
        reference_BCV=logits_BCV + 0.4 * change_BCV,
    )


class Model:
    """A table of logits that answers as the models do which TRL's trainers call."""

    training = True

    def __init__(self, case: Case, logits_BCV: Tensor) -> None:
        self.case, self.logits_BCV = case, logits_BCV

    def __call__(self, *_: Any, labels: Tensor | None = None, **__: Any) -> Any:
        if labels is None:  # the older trainers, which make log-probabilities from logits themselves
            end_B1V = torch.zeros_like(self.logits_BCV[:, :1])
            return SimpleNamespace(logits=torch.cat([self.logits_BCV, end_B1V], 1))
        logprobs_BC = self.case.logprobs_BC(self.logits_BCV)
        nothing_BC = torch.zeros_like(logprobs_BC)
        return SimpleNamespace(
            log_probs=logprobs_BC, entropy=nothing_BC, mean_logits=nothing_BC, is_top1=nothing_BC.bool()
        )


def trainer(**attributes: Any) -> SimpleNamespace:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        unwrap_model=lambda model: model,
        autocast=nullcontext,
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def sums(case: Case, logits_BCV: Tensor) -> Tensor:
    return case.logprobs_BC(logits_BCV).sum(1)


def pairs_of(case: Case, reference: bool) -> Pairs:
    chosen_P, rejected_P = sums(case, case.logits_BCV).chunk(2)
    chosen_tokens_P, rejected_tokens_P = case.mask_BC.sum(1).chunk(2)
    references = sums(case, case.reference_BCV).chunk(2) if reference else (None, None)
    return Pairs(chosen_P, rejected_P, chosen_tokens_P, rejected_tokens_P, *references)


def gradient(case: Case, weighed: Weighed) -> Tensor:
    """In the table of logits, from the weights of the sequences alone."""
    logits_BCV = case.logits_BCV.clone().requires_grad_()
    weights_B = torch.tensor([row[side] for side in range(2) for row in weighed.weights])
    (gradient_BCV,) = torch.autograd.grad((weights_B * sums(case, logits_BCV)).sum(), logits_BCV)
    return gradient_BCV


def agree(case: Case, weighed: Weighed, loss: Tensor, logits_BCV: Tensor, tolerance: float = TOLERANCE) -> None:
    (expected_BCV,) = torch.autograd.grad(loss, logits_BCV)
    assert abs(weighed.loss - loss.item()) < tolerance
    assert (gradient(case, weighed) - expected_BCV).abs().max() < tolerance
    assert expected_BCV.abs().max() > 1e-4, "the comparison must not be of zeros"


def metrics_agree(weighed: Weighed, found: dict[str, Any], names: tuple[str, ...], tolerance: float = 1e-6) -> None:
    for name in names:
        value = found[name][-1] if isinstance(found[name], list) else found[name]
        assert abs(weighed.metrics[name] - float(value)) < tolerance, name


REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins"))
LOGPS = ("logps/chosen", "logps/rejected")

DPO = {
    **{name: {} for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard")},
    **{name: {} for name in ("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft")},
    **{f"{name}, smoothed": {"label_smoothing": 0.1} for name in ("exo_pair", "robust", "aot", "aot_unpaired")},
    "sigmoid+sft": {"loss_weights": (0.7, 1.3)},
    "sigmoid+bco_pair+sft": {"loss_weights": (0.8, 0.2, 1.0)},
}


def dpo_agrees(config: DpoConfig, tolerance: float = TOLERANCE) -> None:
    for seed in range(3):
        case = make_case(seed)
        logits_BCV = case.logits_BCV.clone().requires_grad_()
        references = sums(case, case.reference_BCV).chunk(2)
        stand_in = trainer(
            ld_alpha=None,
            precompute_ref_logps=True,
            use_weighting=False,
            f_divergence_type=config.f_divergence_type,
            f_alpha_divergence_coef=config.f_alpha_divergence_coef,
            loss_types=list(config.loss_type),
            loss_weights=list(config.loss_weights or [1.0] * len(config.loss_type)),
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            args=SimpleNamespace(discopop_tau=config.discopop_tau),
        )
        inputs = {**case.inputs, "ref_chosen_logps": references[0], "ref_rejected_logps": references[1]}
        loss = DPOTrainer._compute_loss(stand_in, Model(case, logits_BCV), inputs, return_outputs=False)
        weighed = weigh_pairs(pairs_of(case, reference=True), config)
        agree(case, weighed, loss, logits_BCV, tolerance)
        metrics_agree(weighed, stand_in._metrics["train"], (*REWARDS, *LOGPS), max(tolerance, 1e-6))


@pytest.mark.parametrize("name", DPO)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_agrees_in_loss_and_gradient(name: str, beta: float) -> None:
    loss_type: Any = tuple(name.partition(",")[0].split("+"))
    dpo_agrees(DpoConfig(loss_type=loss_type, beta=beta, **DPO[name]))


@pytest.mark.parametrize("loss_type", DIVERGING)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_every_loss_that_knows_divergences_agrees_with_each(loss_type: Any, divergence: Any, beta: float) -> None:
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    dpo_agrees(DpoConfig(loss_type=loss_type, beta=beta, f_divergence_type=divergence, label_smoothing=smoothing))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("loss_type", DIVERGING)
def test_the_alpha_divergence_agrees(alpha: float, loss_type: Any) -> None:
    """TRL knows it in float32 and less."""
    torch.set_default_dtype(torch.float32)
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    config = DpoConfig(
        loss_type=loss_type, beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha,
        label_smoothing=smoothing,
    )  # fmt: skip
    dpo_agrees(config, tolerance=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [(1, 0, 1, 1, 0, 0, 1, 0), (1,) * 8, (0,) * 8])
@pytest.mark.parametrize("farther", [True, False])
def test_kto_agrees_in_loss_and_gradient(loss_type: str, labels: tuple[int, ...], farther: bool) -> None:
    """`farther`: the policy has gone from its reference so that the estimate of the divergence is above 0."""
    case, other = make_case(3), make_case(4)
    config = KtoConfig(loss_type=loss_type, beta=0.3, desirable_weight=1.3, undesirable_weight=0.8)
    logits_BCV = case.logits_BCV.clone().requires_grad_()
    kl_S = sums(other, other.logits_BCV)
    reference_kl_S = kl_S - 3.0 if farther else kl_S + 3.0
    reference_S, good_S = sums(case, case.reference_BCV), torch.tensor(labels).bool()
    stand_in = trainer(
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        precompute_ref_logps=True,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        _compute_kl_logps=lambda model, batch: kl_S if loss_type == "kto" else None,
    )
    batch = {**case.inputs, "label": good_S, "ref_logps": reference_S, "ref_KL_logps": reference_kl_S}
    loss = KTOTrainer._compute_loss(stand_in, Model(case, logits_BCV), batch, return_outputs=False)
    judged = Judged(sums(case, case.logits_BCV), reference_S, good_S, kl_estimate(kl_S, reference_kl_S))
    weighed = weigh_judged(judged, config)
    (expected_BCV,) = torch.autograd.grad(loss, logits_BCV)
    mine_BCV = case.logits_BCV.clone().requires_grad_()
    weights_S = torch.tensor([weight for (weight,) in weighed.weights])
    (found_BCV,) = torch.autograd.grad((weights_S * sums(case, mine_BCV)).sum(), mine_BCV)
    assert abs(weighed.loss - loss.item()) < TOLERANCE
    assert (found_BCV - expected_BCV).abs().max() < TOLERANCE
    assert expected_BCV.abs().max() > 1e-4
    if loss_type == "kto":
        assert (weighed.metrics["kl"] > 0) is farther
    names = [f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")]
    metrics_agree(weighed, stand_in._metrics["train"], tuple(n for n in names if n in weighed.metrics))
    assert len(weighed.metrics) == (6 if len(set(labels)) == 2 else 3)


def older(case: Case, kind: Any, logits_BCV: Tensor, **attributes: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss and metrics of TRL's ORPO and CPO, which lay out their batches themselves."""
    stand_in = trainer(padding_value=0, pad_token_id=0, loss_type=attributes.pop("loss_type", None), **attributes)
    labels_BC = case.inputs["input_ids"].masked_fill(case.inputs["completion_mask"] == 0, -100)
    whole = {
        "concatenated_input_ids": case.inputs["input_ids"],
        "concatenated_attention_mask": case.inputs["attention_mask"],
        "concatenated_labels": labels_BC,
    }
    stand_in.concatenated_inputs = lambda *_, **__: whole
    stand_in.get_batch_logps = kind.get_batch_logps
    for method in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
        if hasattr(kind, method):
            setattr(stand_in, method, getattr(kind, method).__get__(stand_in))
    batch = {"chosen_labels": labels_BC[: len(labels_BC) // 2]}
    return kind.get_batch_loss_metrics(stand_in, Model(case, logits_BCV), batch)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_agrees_in_loss_and_gradient(beta: float) -> None:
    for seed in range(3):
        case = make_case(seed)
        logits_BCV = case.logits_BCV.clone().requires_grad_()
        loss, metrics = older(case, ORPOTrainer, logits_BCV, beta=beta)
        weighed = weigh_pairs(pairs_of(case, reference=False), OrpoConfig(beta=beta))
        agree(case, weighed, loss, logits_BCV, tolerance=FLOAT32)
        means = {f"logps/{side}": weighed.metrics[f"rewards/{side}"] / beta for side in ("chosen", "rejected")}
        assert all(math.isclose(metrics[name], value, abs_tol=1e-6) for name, value in means.items())
        metrics_agree(weighed, metrics, (*REWARDS, "nll_loss", "log_odds_chosen"))


def cpo_agrees(config: CpoConfig) -> None:
    their_type = "simpo" if config.loss_type == "alphapo" else config.loss_type  # as TRL's CPOConfig says it
    for seed in range(3):
        case = make_case(seed)
        logits_BCV = case.logits_BCV.clone().requires_grad_()
        loss, metrics = older(
            case,
            CPOTrainer,
            logits_BCV,
            loss_type=their_type,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            cpo_alpha=config.cpo_alpha,
            simpo_gamma=config.simpo_gamma,
            alpha=config.alpha,
        )
        weighed = weigh_pairs(pairs_of(case, reference=False), config)
        agree(case, weighed, loss, logits_BCV)
        metrics_agree(weighed, metrics, REWARDS)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
@pytest.mark.parametrize("cpo_alpha", [0.0, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_and_simpo_agree_in_loss_and_gradient(loss_type: Any, cpo_alpha: float, label_smoothing: float) -> None:
    if loss_type in ("hinge", "ipo"):
        label_smoothing = 0.0
    cpo_agrees(CpoConfig(loss_type=loss_type, beta=0.4, cpo_alpha=cpo_alpha, label_smoothing=label_smoothing))


@pytest.mark.parametrize("alpha", [-0.3, 0.25, 1.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_alphapo_agrees_in_loss_and_gradient(alpha: float, label_smoothing: float) -> None:
    cpo_agrees(CpoConfig(loss_type="alphapo", beta=0.4, alpha=alpha, label_smoothing=label_smoothing))
    theirs = TrlCpoConfig(loss_type="alphapo", bf16=False, use_cpu=True)
    assert (theirs.loss_type, theirs.cpo_alpha) == ("simpo", 0.0)


@pytest.mark.parametrize("alpha", [-0.3, 0.05])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_alpha_agrees_with_the_other_losses_too(loss_type: Any, alpha: float) -> None:
    cpo_agrees(CpoConfig(loss_type=loss_type, beta=0.4, alpha=alpha))


@pytest.mark.parametrize("margin", [True, False])
@pytest.mark.parametrize("centering", [None, 0.01])
def test_reward_modelling_agrees_in_loss_and_gradient(margin: bool, centering: float | None) -> None:
    random = torch.Generator().manual_seed(5)
    scores_B = torch.randn(8, generator=random).requires_grad_()
    margin_P = torch.rand(4, generator=random)
    stand_in = trainer(args=SimpleNamespace(center_rewards_coefficient=centering))
    inputs = {"attention_mask": torch.ones(8, 3), **({"margin": margin_P} if margin else {})}
    model = lambda **_: SimpleNamespace(logits=scores_B[:, None])  # noqa: E731
    loss = RewardTrainer.compute_loss(stand_in, model, inputs)
    (expected_B,) = torch.autograd.grad(loss, scores_B)
    chosen_P, rejected_P = scores_B.detach().clone().chunk(2)
    ones_P = torch.ones(4)
    pairs = Pairs(chosen_P, rejected_P, ones_P, ones_P, margin_P=margin_P if margin else None)
    weighed = weigh_pairs(pairs, BradleyTerryConfig(center_rewards_coefficient=centering))
    assert abs(weighed.loss - loss.item()) < TOLERANCE
    found_B = torch.tensor([row[side] for side in range(2) for row in weighed.weights])
    assert (found_B - expected_B).abs().max() < TOLERANCE
    assert expected_B.abs().max() > 1e-2
    metrics_agree(
        weighed, stand_in._metrics["train"], ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")
    )
