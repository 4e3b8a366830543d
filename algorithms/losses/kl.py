"""How far the policy is from the reference, estimated on the sampled tokens (http://joschu.net/blog/kl-approx.html).

Legend: N = loss tokens of the micro-batch.
"""

import torch
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.corrections import sequence_sum
from algorithms.losses.tokens import Tokens


def kl_k2(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: its gradient on policy is that of the reverse KL (arXiv 2501.03262)."""
    return (logprobs_N - reference_logprobs_N).square() / 2


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - current: never negative, and 0 only where the two agree."""
    difference_N = reference_logprobs_N - logprobs_N
    return torch.expm1(difference_N) - difference_N


def kl_term(tokens: Tokens, ratio_N: Tensor, config: GrpoConfig) -> Tensor | None:
    """The estimate that enters the loss when `kl_penalty` is `k2` or `k3`, else k3 to be measured; None without beta.

    In the loss the ratio corrects it for having been sampled by other weights; k3 has the unbiased gradient only when
    the ratio's own is part of it (DeepSeek-V3.2, arXiv 2512.02556), k2 only when it is not.
    """
    if config.beta == 0:
        return None
    reference_logprobs_N = tokens.reference_logprobs_N
    assert reference_logprobs_N is not None, "beta > 0 needs the reference's log-probabilities"
    correction_N = ratio_N if config.use_bias_correction_kl else torch.ones_like(ratio_N)
    match config.kl_penalty:
        case "k3":
            return kl_k3(tokens.logprobs_N, reference_logprobs_N) * correction_N
        case "k2":
            return kl_k2(tokens.logprobs_N, reference_logprobs_N) * correction_N.detach()
        case _:
            return kl_k3(tokens.logprobs_N, reference_logprobs_N).detach()


def penalised(advantages_N: Tensor, tokens: Tokens, config: GrpoConfig, kl_weight: float) -> Tensor:
    """The advantages less the estimate k1, log(sampled / reference probability), where that is where the KL belongs.

    `reward_to_go`: of this token and all that follow in its sequence (REINFORCE++, arXiv 2501.03262). `advantage`: of
    this token alone; with a teacher as the reference that is on-policy distillation. An unknown one counts as 0.
    """
    if config.kl_penalty not in ("reward_to_go", "advantage"):
        return advantages_N
    assert tokens.reference_logprobs_N is not None, "a KL penalty needs the reference's log-probabilities"
    kl_N = (tokens.sampled_logprobs_N - tokens.reference_logprobs_N).nan_to_num(0.0)
    if config.kl_penalty == "reward_to_go":
        kl_N = to_go(kl_N, tokens.sequence_N, tokens.num_sequences)
    return advantages_N - kl_weight * kl_N


def to_go(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> Tensor:
    """[N]: the sum over this token and all that follow it in its sequence."""
    ends_S = sequence_sum(values_N.double(), sequence_N, num_sequences).cumsum(0)
    before_N = values_N.double().cumsum(0) - values_N
    return (ends_S[sequence_N] - before_N).to(values_N.dtype)
