"""An importance weight corrects a token for the weights that sampled it, once, and carries no gradient.

Legend: N = loss tokens of the micro-batch, S = its sequences, U = N for the token modes and S for the sequence modes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """The same weights twice: as they multiply the tokens, and one for each unit that the mode decides on."""

    weights_N: Tensor
    weights_U: Tensor | None
    """Before rejection; None when all that is applied are rejections."""


def log_ratio(logprobs_N: Tensor, sampled_logprobs_N: Tensor) -> Tensor:
    """log(current / sampled probability), detached; 0 (no correction) where the sampled one is NaN (unknown)."""
    log_ratio_N = logprobs_N.detach() - sampled_logprobs_N
    # Only an unknown *sampled* value is neutral: a policy that yields NaN must stay visible in the loss.
    return torch.where(sampled_logprobs_N.isnan(), torch.zeros_like(log_ratio_N), log_ratio_N)


def importance_weights(
    log_ratio_N: Tensor,
    sequence_N: Tensor,
    *,
    num_sequences: int,
    mode: Mode,
    clip_min: float | None,
    clip_max: float | None,
) -> ImportanceWeights:
    """Every weight lies within [clip_min, clip_max] or, in the mask modes, is 0.

    The ratio is of one token, or of one sequence: the product over its loss tokens, all of which are among the N.
    `truncate` clamps it (TIS), `mask` zeroes what is out of range (MIS; with both bounds and single tokens, IcePop, as
    in Ring-1T, arXiv 2510.18855); None is no bound, and a ratio may then overflow to inf. A sequence without loss
    tokens has the empty product, 1.
    Source: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025), as TRL.
    """
    per_sequence = mode.startswith("sequence")
    log_ratio_U = sequence_sum(log_ratio_N, sequence_N, num_sequences) if per_sequence else log_ratio_N
    ratio_U = log_ratio_U.exp()
    lowest = -math.inf if clip_min is None else clip_min
    highest = math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        weights_U = ratio_U.clamp(lowest, highest)
    else:
        weights_U = ratio_U.masked_fill((ratio_U < lowest) | (ratio_U > highest), 0.0)
    return ImportanceWeights(weights_N=weights_U[sequence_N] if per_sequence else weights_U, weights_U=weights_U)


def geometric_mask(log_ratio_N: Tensor, sequence_N: Tensor, num_sequences: int, bounds: tuple[float, float]) -> Tensor:
    """[N]: 1 where the sequence's ratio, the geometric mean over its tokens, lies within the bounds, else 0.

    Unlike the product, the mean does not drift from 1 with the length, so that long sequences are not rejected for
    being long.
    """
    lowest, highest = bounds
    ratio_S = sequence_mean(log_ratio_N, sequence_N, num_sequences).exp()
    return ((ratio_S >= lowest) & (ratio_S <= highest)).to(log_ratio_N.dtype)[sequence_N]


def off_policy_mask(
    log_ratio_N: Tensor, advantages_N: Tensor, sequence_N: Tensor, num_sequences: int, threshold: float
) -> Tensor:
    """[N]: 0 where the token is punished and its sequence's mean log(sampled / current) exceeds the threshold, else 1.

    Source: DeepSeek-V3.2 (arXiv 2512.02556), as TRL.
    """
    kl_S = -sequence_mean(log_ratio_N, sequence_N, num_sequences)
    kept_N = (advantages_N >= 0) | (kl_S <= threshold)[sequence_N]
    return kept_N.to(log_ratio_N.dtype)


def sequence_mean(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """[S]: the mean over each sequence's tokens, 0 for a sequence without any."""
    num_tokens_S = sequence_sum(torch.ones_like(values_N), sequence_N, num_sequences)
    return sequence_sum(values_N, sequence_N, num_sequences) / num_tokens_S.clamp(min=1)


def sequence_sum(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """[S]: the sum over each sequence's tokens, 0 for a sequence without any, in the dtype of the values."""
    # In float64, because atomic additions on a GPU come in any order: the sum then rounds to the same float32.
    sums_S = torch.zeros(num_sequences, dtype=torch.float64, device=values_N.device)
    return sums_S.index_add(0, sequence_N, values_N.double()).to(values_N.dtype)
