"""Good completions gain and bad ones lose, the less the further they have gone from the reference already."""

import torch
from torch import Tensor

from algorithms.preference.batch import Judged
from algorithms.preference.config import KtoConfig


def kto_loss(judged: Judged, config: KtoConfig) -> Tensor:
    """The mean over the sequences of the global batch (KTO, Eq. 7; `apo_zero_unpaired`: APO, arXiv 2408.06266)."""
    ratio_S = judged.logprobs_S - judged.reference_S
    kl = judged.kl.detach() if config.loss_type == "kto" else torch.zeros_like(judged.kl)
    signed_S = torch.where(judged.good_S, ratio_S - kl, kl - ratio_S)
    weights_S = torch.where(judged.good_S, config.desirable_weight, config.undesirable_weight).to(ratio_S.dtype)
    return (weights_S * (1 - torch.sigmoid(config.beta * signed_S))).mean()


def kl_estimate(logprobs_S: Tensor, reference_S: Tensor) -> Tensor:
    """Mean log ratio of completions that belong to other prompts, at least 0: KTO's point of reference."""
    return (logprobs_S - reference_S).detach().mean().clamp(min=0)
