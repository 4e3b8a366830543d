"""What multiplies the policy term against the weights that sampled: at most one importance weight, and rejections.

Legend: N = loss tokens of the micro-batch.
"""

from dataclasses import replace

from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.corrections import (
    ImportanceWeights,
    geometric_mask,
    importance_weights,
    log_ratio,
    off_policy_mask,
)
from algorithms.losses.tokens import Tokens


def correction(tokens: Tokens, old_logprobs_N: Tensor, config: GrpoConfig) -> ImportanceWeights | None:
    """pi_old / pi_sampled, bounded as the recipe says, and 0 where a mask rejects; None when nothing is to be done.

    The ratio goes from the sampled to the old probabilities, which the trust region then starts from: together they
    are decoupled PPO (arXiv 2110.00641). What is rejected stays in the counts that divide.
    """
    weights = _importance(tokens, old_logprobs_N, config)
    kept_N = _kept(tokens, config)
    if kept_N is None:
        return weights
    if weights is None:
        return ImportanceWeights(weights_N=kept_N, weights_U=None)
    # By selection: a weight without an upper bound may be inf, and 0 x inf is NaN.
    return replace(weights, weights_N=weights.weights_N.where(kept_N > 0, 0.0))


def _importance(tokens: Tokens, old_logprobs_N: Tensor, config: GrpoConfig) -> ImportanceWeights | None:
    if not config.vllm_importance_sampling_correction:
        return None
    assert config.old_logprobs != "sampled", "a ratio against the sampled probabilities is already the correction"
    return importance_weights(
        log_ratio(old_logprobs_N, tokens.sampled_logprobs_N),
        tokens.sequence_N,
        num_sequences=tokens.num_sequences,
        mode=config.vllm_importance_sampling_mode,
        clip_min=config.vllm_importance_sampling_clip_min,
        clip_max=config.vllm_importance_sampling_clip_max,
    )


def _kept(tokens: Tokens, config: GrpoConfig) -> Tensor | None:
    """1 for each token that the masks leave in, else 0; None without a mask."""
    kept_N = None
    if config.geometric_mask_range is not None:
        log_ratio_N = log_ratio(tokens.start_logprobs_N, tokens.sampled_logprobs_N)
        kept_N = geometric_mask(log_ratio_N, tokens.sequence_N, tokens.num_sequences, config.geometric_mask_range)
    if config.off_policy_mask_threshold is not None:
        log_ratio_N = log_ratio(tokens.logprobs_N, tokens.sampled_logprobs_N)
        threshold = config.off_policy_mask_threshold
        low_kl_N = off_policy_mask(log_ratio_N, tokens.advantages_N, tokens.sequence_N, tokens.num_sequences, threshold)
        kept_N = low_kl_N if kept_N is None else kept_N * low_kl_N
    return kept_N
