"""What a token costs, by its ratio r and its advantage A; where r has gone far enough, the gradient is cut off.

Legend: N = loss tokens of the micro-batch.
"""

import math

import torch
from torch import Tensor

from algorithms.config import GrpoConfig


def surrogate(ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, config: GrpoConfig) -> Tensor:
    """The policy term of each token's loss, as `loss_type` says."""
    low, high = clip_range(config)
    if config.loss_type == "cispo":
        return cispo(ratio_N, logprobs_N, advantages_N, high)
    return clipped(ratio_N, advantages_N, low, high, config.delta)


def clipped(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float, delta: float | None) -> Tensor:
    """-min(r A, clip(r, low, high) A): nothing is gained by going further (PPO, arXiv 1707.06347).

    `delta`, above `high`, bounds the cost of a punished token (A < 0) whose ratio has exploded: max(..., delta A), the
    dual clip (arXiv 1912.09729).
    """
    bounded_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    return -torch.minimum(bounded_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)


def cispo(ratio_N: Tensor, logprobs_N: Tensor, advantages_N: Tensor, high: float) -> Tensor:
    """-sg(min(r, high)) A log pi: the weight is cut off, and every token keeps its gradient (arXiv 2506.13585)."""
    return -ratio_N.clamp(max=high).detach() * advantages_N * logprobs_N


def clip_range(config: GrpoConfig) -> tuple[float, float]:
    """The ratios between which nothing is cut off, whatever the advantage's sign."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if config.loss_type == "cispo":
        return -math.inf, high
    return 1.0 - config.epsilon, 1.0 + high
