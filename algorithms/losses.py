"""The shares of all micro-batches and ranks sum to the loss of the global batch, however the batch is cut.

Legend: N = loss tokens of the micro-batch, S = its sequences. A sequence lies in one micro-batch with all its tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.corrections import ImportanceWeights, importance_weights, log_ratio, sequence_sum
from algorithms.stats import LossStats, measure
from algorithms.types import Batch


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Counts over the global batch before any rejection, so that a masked token leaves the others' weight as it was."""

    num_sequences: int
    """Every rollout of the batch, with the truncated ones that `mask_truncated_completions` left out, as TRL counts."""
    num_loss_tokens: int
    max_completion_length: int
    num_micro_batches: int
    """Micro-batches with loss tokens, over all ranks; empty ones only keep the ranks in step."""

    @classmethod
    def of(cls, batch: Batch, max_completion_length: int) -> "Normalizer":
        return cls(
            num_sequences=batch.num_sequences,
            num_loss_tokens=batch.num_loss_tokens,
            max_completion_length=max_completion_length,
            num_micro_batches=sum(bool(micro_batch.samples) for rank in batch.ranks for micro_batch in rank),
        )


def grpo_loss(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    sampled_logprobs_N: Tensor,
    reference_logprobs_N: Tensor | None,
    advantages_N: Tensor,
    sequence_N: Tensor,
    *,
    num_sequences: int,
    config: GrpoConfig,
    normalizer: Normalizer,
    fresh_N: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """This micro-batch's share of the loss, with gradient through `logprobs_N` alone, and its statistics.

    Each token costs -min(r A, clip(r) A) w + beta KL, with r the ratio of the current to the old probability, w the
    importance weight and KL the estimate k3 against the reference (http://joschu.net/blog/kl-approx.html).
    `old_logprobs: recomputed` takes the current ones as old: r is 1 and carries the gradient, and w corrects the
    policy term for the sampling weights; the KL term it leaves alone. `sampled` takes the ones recorded at sampling:
    r is itself the correction, and w is 1. A NaN sampled log-probability (unknown) is not corrected for.

    All tensors are flat over the loss tokens; `sequence_N` (int64) says to which of the S sequences a token belongs.
    `mask_truncated_completions` is the caller's: tokens of truncated rollouts are not among the N.
    Where `fresh_N` is False the token leaves loss, gradient, importance weights and statistics, whatever its values;
    it stays in the counts that divide, so that the other tokens weigh what they did. None: all are fresh.
    Without a fresh token the share is 0 and still hangs on the graph of `logprobs_N`, so that every rank has a backward
    pass.
    Sources: DeepSeekMath (arXiv 2402.03300); clip-higher: DAPO (arXiv 2503.14476); agrees with TRL's GRPOTrainer.
    """
    num_tokens = len(logprobs_N)
    tokens_N = sequence_sum(torch.ones_like(logprobs_N), sequence_N, num_sequences)[sequence_N]
    if fresh_N is not None:
        # By selection, not by a factor: 0 x inf is NaN, and so is its gradient. What is not selected has gradient 0.
        logprobs_N, entropy_N, sampled_logprobs_N, advantages_N, tokens_N = (
            values_N[fresh_N] for values_N in (logprobs_N, entropy_N, sampled_logprobs_N, advantages_N, tokens_N)
        )
        reference_logprobs_N = None if reference_logprobs_N is None else reference_logprobs_N[fresh_N]
        # A sequence without a fresh token is in no statistic: its importance weight would be the empty product.
        present, sequence_N = sequence_N[fresh_N].unique(return_inverse=True)
        num_sequences = len(present)
    if len(logprobs_N) == 0:
        return logprobs_N.sum() * 0.0, LossStats()
    log_ratio_N, sampled_N = log_ratio(logprobs_N, sampled_logprobs_N), ~sampled_logprobs_N.isnan()
    old_logprobs_N = logprobs_N.detach()
    if config.old_logprobs == "sampled":
        old_logprobs_N = torch.where(sampled_N, sampled_logprobs_N, old_logprobs_N)
    ratio_N = torch.exp(logprobs_N - old_logprobs_N)
    low, high = clip_range(config)
    loss_N = -torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    weights = _weights(log_ratio_N, sequence_N, num_sequences, config)
    if weights is not None:
        loss_N = loss_N * weights.weights_N
    kl_N = None
    if config.beta > 0:
        assert reference_logprobs_N is not None, "beta > 0 needs the reference's log-probabilities"
        kl_N = kl_k3(logprobs_N, reference_logprobs_N)
        if config.use_bias_correction_kl:
            kl_N = kl_N * ratio_N
        loss_N = loss_N + config.beta * kl_N
    loss = _share(loss_N, tokens_N, num_tokens, config, normalizer)
    stats = measure(
        loss=loss,
        entropy_N=entropy_N,
        kl_N=kl_N,
        ratio_N=ratio_N,
        clip_range=(low, high),
        log_ratio_N=log_ratio_N,
        sampled_N=sampled_N,
        advantages_N=advantages_N,
        sequence_N=sequence_N,
        num_sequences=num_sequences,
        weights=weights,
    )
    return loss, stats


def sft_loss(logprobs_N: Tensor, entropy_N: Tensor, num_loss_tokens: int) -> tuple[Tensor, LossStats]:
    """This micro-batch's share of the mean negative log-likelihood over the `num_loss_tokens` of the global batch.

    With N = 0 the share is 0 and still hangs on the graph of `logprobs_N`.
    """
    loss = -logprobs_N.sum() / max(num_loss_tokens, 1)
    with torch.no_grad():
        loss_value, entropy = torch.stack([loss.double(), entropy_N.double().sum()]).tolist()
    return loss, LossStats(loss=loss_value, entropy=entropy, num_tokens=len(logprobs_N))


def clip_range(config: GrpoConfig) -> tuple[float, float]:
    """The ratios between which the gradient flows whatever the advantage's sign."""
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    return 1.0 - config.epsilon, 1.0 + high


def kl_k3(logprobs_N: Tensor, reference_logprobs_N: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference - current: never negative, and 0 only where the two agree."""
    difference_N = reference_logprobs_N - logprobs_N
    return torch.expm1(difference_N) - difference_N


def _weights(
    log_ratio_N: Tensor, sequence_N: Tensor, num_sequences: int, config: GrpoConfig
) -> ImportanceWeights | None:
    """The importance weights that the recipe asks for; never on top of a ratio that already corrects."""
    if not config.vllm_importance_sampling_correction:
        return None
    assert config.old_logprobs == "recomputed", "a ratio against the sampled probabilities is already the correction"
    return importance_weights(
        log_ratio_N,
        sequence_N,
        num_sequences=num_sequences,
        mode=config.vllm_importance_sampling_mode,
        clip_min=config.vllm_importance_sampling_clip_min,
        clip_max=config.vllm_importance_sampling_clip_max,
    )


def _share(loss_N: Tensor, tokens_N: Tensor, num_tokens: int, config: GrpoConfig, normalizer: Normalizer) -> Tensor:
    """What these tokens add to the global mean that `loss_type` names.

    `tokens_N` are the loss tokens of each token's sequence and `num_tokens` those of the micro-batch, stale or not.
    """
    match config.loss_type:
        case "grpo":
            return (loss_N / tokens_N).sum() / normalizer.num_sequences
        case "dapo":
            return loss_N.sum() / normalizer.num_loss_tokens
        case "dr_grpo":
            return loss_N.sum() / (normalizer.num_sequences * normalizer.max_completion_length)
        case "bnpo":
            return loss_N.sum() / num_tokens / normalizer.num_micro_batches
