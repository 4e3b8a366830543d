"""The chosen answer is to be likelier than the rejected one, by a margin with SimPO; no reference is needed."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preference.batch import Pairs
from algorithms.preference.config import CpoConfig


def cpo_loss(pairs: Pairs, config: CpoConfig) -> Tensor:
    """The mean contrast over the pairs plus cpo_alpha x the negative log-likelihood of the chosen tokens."""
    beta, smoothing = config.beta, config.label_smoothing
    chosen_P, rejected_P = compared(pairs, config)
    logits_P = chosen_P - rejected_P
    match config.loss_type:
        case "hinge":
            loss_P = torch.relu(1 - beta * logits_P)
        case "ipo":
            loss_P = (logits_P - 1 / (2 * beta)) ** 2
        case "sigmoid" | "simpo" | "alphapo":
            scaled_P = beta * logits_P - (0.0 if config.loss_type == "sigmoid" else config.simpo_gamma)
            loss_P = -logsigmoid(scaled_P) * (1 - smoothing) - logsigmoid(-scaled_P) * smoothing
    return loss_P.mean() + config.cpo_alpha * pairs.chosen_nll if config.cpo_alpha > 0 else loss_P.mean()


def compared(pairs: Pairs, config: CpoConfig) -> tuple[Tensor, Tensor]:
    """What the loss compares of chosen and rejected completions, to be multiplied by beta.

    `simpo`, `alphapo` and `ipo` take the mean log-probability of a token, the others the sum (TRL's CPOTrainer). With
    `alpha` it is (1 - p^-alpha) / alpha of that probability p (AlphaPO, arXiv 2501.03884), which towards 0 is log p.
    """
    chosen_P, rejected_P = pairs.chosen_P, pairs.rejected_P
    if config.loss_type in ("ipo", "simpo", "alphapo"):
        chosen_P, rejected_P = chosen_P / pairs.chosen_tokens_P, rejected_P / pairs.rejected_tokens_P
    if config.alpha == 0:
        return chosen_P, rejected_P
    return -torch.expm1(-config.alpha * chosen_P) / config.alpha, -torch.expm1(
        -config.alpha * rejected_P
    ) / config.alpha
