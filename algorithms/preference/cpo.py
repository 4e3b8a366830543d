"""The chosen answer is to be likelier than the rejected one, by a margin with SimPO; no reference is needed."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preference.batch import Pairs
from algorithms.preference.config import CpoConfig


def cpo_loss(pairs: Pairs, config: CpoConfig) -> Tensor:
    """The mean contrast over the pairs plus cpo_alpha x the negative log-likelihood of the chosen tokens.

    `simpo` and `ipo` compare mean log-probabilities of a token, the others sums (TRL's CPOTrainer).
    """
    beta, smoothing = config.beta, config.label_smoothing
    chosen_P, rejected_P = pairs.chosen_P, pairs.rejected_P
    if config.loss_type in ("ipo", "simpo"):
        chosen_P, rejected_P = chosen_P / pairs.chosen_tokens_P, rejected_P / pairs.rejected_tokens_P
    logits_P = chosen_P - rejected_P
    match config.loss_type:
        case "hinge":
            loss_P = torch.relu(1 - beta * logits_P)
        case "ipo":
            loss_P = (logits_P - 1 / (2 * beta)) ** 2
        case "sigmoid" | "simpo":
            scaled_P = beta * logits_P - (config.simpo_gamma if config.loss_type == "simpo" else 0.0)
            loss_P = -logsigmoid(scaled_P) * (1 - smoothing) - logsigmoid(-scaled_P) * smoothing
    return loss_P.mean() + config.cpo_alpha * pairs.chosen_nll if config.cpo_alpha > 0 else loss_P.mean()
