"""A reward model's scores say that the chosen answer is better with the probability sigmoid(chosen - rejected)."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.preference.batch import Pairs
from algorithms.preference.config import BradleyTerryConfig


def bradley_terry_loss(pairs: Pairs, config: BradleyTerryConfig) -> Tensor:
    """The mean over the pairs; margins are those of Llama 2 (arXiv 2307.09288), centering is arXiv 2312.09244."""
    margin_P = torch.zeros_like(pairs.chosen_P) if pairs.margin_P is None else pairs.margin_P
    loss = -logsigmoid(pairs.chosen_P - pairs.rejected_P - margin_P).mean()
    if config.center_rewards_coefficient is not None:
        loss = loss + config.center_rewards_coefficient * ((pairs.chosen_P + pairs.rejected_P) ** 2).mean()
    return loss
