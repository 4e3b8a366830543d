"""Each loss is the mean over the pairs of the global batch of a function of the four log-probabilities of a pair.

Names and formulas are those of TRL's DPOTrainer; docs/offline.md lists them with their papers.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preference.batch import Pairs
from algorithms.preference.config import DpoConfig, DpoLoss

_LARGEST = 80.0
"""Of an exponent in the alpha divergence: beyond it float32 has no number."""


def dpo_loss(pairs: Pairs, config: DpoConfig) -> Tensor:
    """The weighted sum of the losses that the recipe names, each averaged over the pairs."""
    losses = [weight * _loss_P(name, pairs, config).mean() for name, weight in config.weighted]
    return torch.stack(losses).sum()


def scores(pairs: Pairs, config: DpoConfig) -> tuple[Tensor, Tensor]:
    """f'(policy / reference) of chosen and rejected completions, for the divergence that f makes."""

    def score(ratio_P: Tensor) -> Tensor:
        match config.f_divergence_type:
            case "reverse_kl":
                return ratio_P
            case "forward_kl":
                return 1 - torch.exp(-ratio_P)
            case "js_divergence":
                return math.log(2) + logsigmoid(ratio_P)
            case "alpha_divergence":
                power = config.f_alpha_divergence_coef - 1
                if abs(power) < 1e-6:  # where it is the reverse KL divergence
                    return ratio_P
                return torch.expm1((power * ratio_P).clamp(max=_LARGEST)) / power

    chosen_P, rejected_P = pairs.ratios
    return score(chosen_P), score(rejected_P)


def _loss_P(name: DpoLoss, pairs: Pairs, config: DpoConfig) -> Tensor:
    beta, smoothing = config.beta, config.label_smoothing
    chosen_P, rejected_P = pairs.ratios
    chosen_score_P, rejected_score_P = scores(pairs, config)
    difference_P = chosen_score_P - rejected_score_P
    match name:
        case "sigmoid":
            return -logsigmoid(beta * difference_P)
        case "hinge":
            return torch.relu(1 - beta * difference_P)
        case "ipo" | "sigmoid_norm":
            # Per token, so that the length of the answers does not set the scale; the authors of IPO mean it so.
            mean_P = chosen_score_P / pairs.chosen_tokens_P - rejected_score_P / pairs.rejected_tokens_P
            return (mean_P - 1 / (2 * beta)) ** 2 if name == "ipo" else -logsigmoid(beta * mean_P)
        case "exo_pair":
            return _exo_P(beta * difference_P, smoothing)
        case "nca_pair":
            return (
                -logsigmoid(beta * chosen_P) - 0.5 * logsigmoid(-beta * chosen_P) - 0.5 * logsigmoid(-beta * rejected_P)
            )
        case "robust":
            noisy_P = (1 - smoothing) * logsigmoid(beta * difference_P) - smoothing * logsigmoid(-beta * difference_P)
            return -noisy_P / (1 - 2 * smoothing)
        case "bco_pair":
            return -logsigmoid(beta * chosen_P) - logsigmoid(-beta * rejected_P)
        case "sppo_hard":
            return (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2
        case "aot":
            assert pairs.reference_chosen_P is not None, "this loss is against a reference"
            assert pairs.reference_rejected_P is not None, "this loss is against a reference"
            reference_P = pairs.reference_chosen_P - pairs.reference_rejected_P
            return _smoothed_P(
                beta * ((pairs.chosen_P - pairs.rejected_P).sort().values - reference_P.sort().values), smoothing
            )
        case "aot_unpaired":
            return _smoothed_P(beta * (chosen_P.sort().values - rejected_P.sort().values), smoothing)
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * rejected_P)
        case "apo_down":
            return torch.sigmoid(beta * chosen_P) + 1 - torch.sigmoid(beta * (chosen_P - rejected_P))
        case "discopop":
            logits_P = beta * difference_P
            share_P = torch.sigmoid(logits_P / config.discopop_tau)
            return -logsigmoid(logits_P) * (1 - share_P) + torch.exp(-logits_P) * share_P
        case "sft":
            return pairs.chosen_nll.expand(len(chosen_P))


def _smoothed_P(logits_P: Tensor, smoothing: float) -> Tensor:
    return -logsigmoid(logits_P) * (1 - smoothing) - logsigmoid(-logits_P) * smoothing


def _exo_P(logits_P: Tensor, smoothing: float) -> Tensor:
    """KL of the policy's preference to the labels', which are wrong with the probability `smoothing` (EXO, Eq. 16)."""
    log_right_P, log_wrong_P = logsigmoid(logits_P), logsigmoid(-logits_P)
    return log_right_P.exp() * (log_right_P - math.log1p(-smoothing)) + log_wrong_P.exp() * (
        log_wrong_P - math.log(smoothing)
    )
