"""Supervised fine-tuning maximises the likelihood of the examples' completions."""

import torch
from torch import Tensor

from algorithms.stats import LossStats


def sft_loss(logprobs_N: Tensor, entropy_N: Tensor, num_loss_tokens: int) -> tuple[Tensor, LossStats]:
    """This micro-batch's share of the mean negative log-likelihood over the `num_loss_tokens` of the global batch.

    With N = 0 the share is 0 and still hangs on the graph of `logprobs_N`.
    """
    loss = -logprobs_N.sum() / max(num_loss_tokens, 1)
    with torch.no_grad():
        loss_value, entropy = torch.stack([loss.double(), entropy_N.double().sum()]).tolist()
    return loss, LossStats(loss=loss_value, entropy=entropy, num_tokens=len(logprobs_N))
