"""What each sequence weighs in the gradient: d loss / d (its number), so that ranks need only sum weight x number.

Every loss here is a function of one number per sequence. Once all numbers of the global batch are known, its gradient
in the weights of the policy is the sum over the sequences of that derivative times the gradient of the sequence's own
number: exact for any loss, whichever rank and micro-batch a sequence lies in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.preference.batch import Judged, Pairs
from algorithms.preference.bradley_terry import bradley_terry_loss
from algorithms.preference.config import BradleyTerryConfig, CpoConfig, DpoConfig, KtoConfig, OrpoConfig
from algorithms.preference.cpo import compared, cpo_loss
from algorithms.preference.dpo import dpo_loss
from algorithms.preference.kto import kto_loss
from algorithms.preference.orpo import log_odds_ratio, orpo_loss
from algorithms.stats import LossStats

PairConfig = DpoConfig | OrpoConfig | CpoConfig | BradleyTerryConfig


@dataclass(frozen=True, slots=True)
class Weighed:
    """The loss of one global batch, and each sequence's part in its gradient."""

    loss: float
    weights: tuple[tuple[float, ...], ...]
    """For each pair (chosen, rejected), for each sequence that is judged alone (weight,)."""
    metrics: dict[str, float]
    """Under TRL's names."""


def pair_loss(pairs: Pairs, config: PairConfig) -> Tensor:
    """The loss of the global batch, with gradient through what has one."""
    match config:
        case DpoConfig():
            return dpo_loss(pairs, config)
        case OrpoConfig():
            return orpo_loss(pairs, config)
        case CpoConfig():
            return cpo_loss(pairs, config)
        case BradleyTerryConfig():
            return bradley_terry_loss(pairs, config)


def weigh_pairs(pairs: Pairs, config: PairConfig) -> Weighed:
    """Loss, weights and metrics of all pairs of the global batch."""
    pairs.chosen_P.requires_grad_()
    pairs.rejected_P.requires_grad_()
    with torch.enable_grad():
        loss = pair_loss(pairs, config)
        gradients = torch.autograd.grad(loss, (pairs.chosen_P, pairs.rejected_P), allow_unused=True)
    chosen_P, rejected_P = (torch.zeros_like(pairs.chosen_P) if g is None else g for g in gradients)
    weights = tuple(zip(chosen_P.tolist(), rejected_P.tolist(), strict=True))
    return Weighed(loss.item(), weights, _pair_metrics(pairs, config))


def weigh_judged(judged: Judged, config: KtoConfig) -> Weighed:
    """Loss, weights and metrics of all sequences of the global batch that are judged alone."""
    judged.logprobs_S.requires_grad_()
    with torch.enable_grad():
        loss = kto_loss(judged, config)
        (gradient_S,) = torch.autograd.grad(loss, judged.logprobs_S)
    return Weighed(loss.item(), tuple((weight,) for weight in gradient_S.tolist()), _judged_metrics(judged, config))


def weighted_sum(values_N: Tensor, entropy_N: Tensor, weights_N: Tensor) -> tuple[Tensor, LossStats]:
    """The micro-batch's share of the gradient, as a sum to differentiate: each token has its sequence's weight.

    Its value is not the loss. Without tokens it is 0 and still hangs on the graph of `values_N`.
    """
    share = (weights_N * values_N).sum()
    with torch.no_grad():
        loss, entropy = torch.stack([share.double(), entropy_N.double().sum()]).tolist()
    return share, LossStats(loss=loss, entropy=entropy, num_tokens=len(values_N))


@torch.no_grad()
def _pair_metrics(pairs: Pairs, config: PairConfig) -> dict[str, float]:
    if isinstance(config, BradleyTerryConfig):
        both = torch.cat([pairs.chosen_P, pairs.rejected_P])
        return {
            "min_reward": both.min().item(),
            "mean_reward": both.mean().item(),
            "max_reward": both.max().item(),
            "accuracy": (pairs.chosen_P > pairs.rejected_P).double().mean().item(),
            "margin": (pairs.chosen_P - pairs.rejected_P).mean().item(),
        }
    chosen_P, rejected_P = pairs.ratios if isinstance(config, DpoConfig) else _implicit(pairs, config)
    metrics = {
        "rewards/chosen": config.beta * chosen_P.mean().item(),
        "rewards/rejected": config.beta * rejected_P.mean().item(),
        "rewards/accuracies": (chosen_P > rejected_P).double().mean().item(),
        "rewards/margins": config.beta * (chosen_P - rejected_P).mean().item(),
        "logps/chosen": pairs.chosen_P.mean().item(),
        "logps/rejected": pairs.rejected_P.mean().item(),
    }
    if isinstance(config, OrpoConfig):
        metrics["log_odds_chosen"] = log_odds_ratio(pairs).mean().item()
    return metrics if isinstance(config, DpoConfig) else {**metrics, "nll_loss": pairs.chosen_nll.item()}


def _implicit(pairs: Pairs, config: OrpoConfig | CpoConfig) -> tuple[Tensor, Tensor]:
    """What the loss compares; of ORPO the log-probabilities of a token on average."""
    if isinstance(config, CpoConfig):
        return compared(pairs, config)
    return pairs.chosen_P / pairs.chosen_tokens_P, pairs.rejected_P / pairs.rejected_tokens_P


@torch.no_grad()
def _judged_metrics(judged: Judged, config: KtoConfig) -> dict[str, float]:
    """Of good and bad completions apart; a batch that has none of one kind says nothing of it."""
    metrics = {"kl": judged.kl.item()}
    for name, which_S in (("chosen", judged.good_S), ("rejected", ~judged.good_S)):
        if which_S.any():
            ratio_S = judged.logprobs_S - judged.reference_S
            metrics[f"rewards/{name}"] = config.beta * ratio_S[which_S].mean().item()
            metrics[f"logps/{name}"] = judged.logprobs_S[which_S].mean().item()
    if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics
