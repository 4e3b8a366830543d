"""Generalised advantage estimation: what each token was worth more than a critic had expected before it.

Schulman et al., arXiv 1506.02438. The value of a token's state is what the critic says before the token is there.

Legend: N = loss tokens, S = their sequences, L = loss tokens of one sequence, or of the longest.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EPSILON = 1e-8
"""Added to the variance that whitening divides by; TRL's value."""

Tokens = NDArray[np.float32]
"""One number for each loss token of a sequence."""


def token_rewards(rewards_S: Tensor, kl_N: Tensor | None, sequence_N: Tensor, beta: float) -> Tensor:
    """[N]: -beta times its KL estimate for each token, and the sequence's reward for its last one."""
    rewards_N = torch.zeros(len(sequence_N), dtype=rewards_S.dtype) if kl_N is None else -beta * kl_N
    last_S = torch.bincount(sequence_N, minlength=len(rewards_S)).cumsum(0) - 1
    return rewards_N.index_add(0, last_S, rewards_S)


def gae(rewards_N: Tensor, values_N: Tensor, sequence_N: Tensor, gamma: float, lam: float) -> Tensor:
    """[N]: the sum over what follows in the sequence of (gamma lam)^l delta, delta = r + gamma V(next) - V.

    Sequences lie one after the other, each with one token at least. Behind the last token nothing is expected, also
    where the length limit has cut the sequence off: as in TRL, its reward is all that comes.
    """
    lengths_S = torch.bincount(sequence_N)
    if len(sequence_N) == 0:
        return torch.zeros_like(values_N)
    first_S = lengths_S.cumsum(0) - lengths_S
    place_N = torch.arange(len(sequence_N)) - first_S[sequence_N]
    rewards_SL = _grid(rewards_N, sequence_N, place_N)
    values_SL = _grid(values_N, sequence_N, place_N)
    following_SL = torch.cat([values_SL[:, 1:], torch.zeros_like(values_SL[:, :1])], 1)
    deltas_SL = rewards_SL + gamma * following_SL - values_SL
    advantages_SL = torch.empty_like(deltas_SL)
    to_go_S = torch.zeros_like(deltas_SL[:, 0])
    for at in reversed(range(deltas_SL.shape[1])):
        to_go_S = deltas_SL[:, at] + gamma * lam * to_go_S
        advantages_SL[:, at] = to_go_S
    return advantages_SL[sequence_N, place_N]


def _grid(numbers_N: Tensor, sequence_N: Tensor, place_N: Tensor) -> Tensor:
    """[S, L], each sequence from the left; 0 behind its last token, which changes none of the numbers before."""
    grid_SL = numbers_N.new_zeros(int(sequence_N.max()) + 1, int(place_N.max()) + 1)
    grid_SL[sequence_N, place_N] = numbers_N
    return grid_SL


def whitened(advantages: Sequence[Tokens], counted: Sequence[NDArray[np.bool_]]) -> list[Tokens]:
    """Less their mean, over their unbiased standard deviation; both over the tokens that count, of all sequences."""
    known_N = np.concatenate([np.zeros(0), *(a[c] for a, c in zip(advantages, counted, strict=True))])
    if len(known_N) == 0:
        return list(advantages)
    mean = float(known_N.mean())
    variance = float(known_N.var(ddof=1)) if len(known_N) > 1 else 0.0
    scale = 1 / math.sqrt(variance + _EPSILON) if variance > 0 or math.isnan(variance) else 0.0
    return [((each.astype(np.float64) - mean) * scale).astype(np.float32) for each in advantages]
