"""The ratio compares the policy with an old one, which no gradient reaches; on policy it is 1 and carries the gradient.

Legend: N = loss tokens of the micro-batch.
"""

import torch
from torch import Tensor

from algorithms.config import OldLogprobs, RatioLevel
from algorithms.corrections import sequence_mean, sequence_sum
from algorithms.losses.tokens import Tokens

_LARGEST = 60.0
"""Of a log-ratio. From 89 on the ratio is inf in float32, and the branch that a clip does not take would have the
gradient 0 x inf, which is NaN. Beyond this a ratio says nothing but "too far", and has no gradient."""


def old_logprobs(tokens: Tokens, method: OldLogprobs) -> Tensor:
    """log pi_old of each token: what the trust region lies around; an unknown sampled one is not corrected for.

    `recomputed`: the policy's own when the step began. `sampled`: what was recorded at sampling. `interpolated`: those
    of one version back, guessed without having its weights: a token that is d versions old is taken to have gone
    (d - 1)/d of the way from its sampled to its present log-probability (AReaL's log-linear form, arXiv 2512.06547).
    """
    start_N, sampled_N = tokens.start_logprobs_N, tokens.sampled_logprobs_N
    known_N = ~sampled_N.isnan()
    match method:
        case "recomputed":
            return start_N
        case "sampled":
            return torch.where(known_N, sampled_N, start_N)
        case "interpolated":
            age_N = tokens.age_N.to(start_N.dtype)
            way_N = (age_N - 1) / age_N.clamp(min=1)
            old_N = sampled_N + way_N * (start_N - sampled_N)
            return torch.where(known_N & (age_N > 0), old_N, start_N)


def policy_ratio(tokens: Tokens, old_logprobs_N: Tensor, level: RatioLevel) -> Tensor:
    """pi / pi_old of each token (PPO, arXiv 1707.06347), or of its sequence, the same for all its tokens.

    `sequence`: the geometric mean over the sequence's tokens (GSPO, arXiv 2507.18071). `sequence_product`: the ratio of
    the two probabilities of the whole sequence, which is one action then (RLOO, arXiv 2402.14740).
    """
    log_ratio_N = tokens.logprobs_N - old_logprobs_N
    match level:
        case "token":
            return _exp(log_ratio_N)
        case "sequence":
            log_ratio_S = sequence_mean(log_ratio_N, tokens.sequence_N, tokens.num_sequences)
        case "sequence_product":
            log_ratio_S = sequence_sum(log_ratio_N, tokens.sequence_N, tokens.num_sequences)
    return _exp(log_ratio_S)[tokens.sequence_N]


def _exp(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(max=_LARGEST))
