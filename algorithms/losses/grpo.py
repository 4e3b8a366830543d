"""GRPO and its kin are one formula; a method is a choice of its ingredients (docs/algorithms.md).

Legend: N = loss tokens of the micro-batch, S = its sequences. A sequence lies in one micro-batch with all its tokens.
"""

from dataclasses import replace

import torch
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.corrections import log_ratio
from algorithms.losses.kl import kl_term, penalised
from algorithms.losses.mean import Normalizer, share
from algorithms.losses.ratio import old_logprobs, policy_ratio
from algorithms.losses.surrogate import clip_range, surrogate
from algorithms.losses.tokens import Tokens, lengths
from algorithms.losses.weights import correction
from algorithms.stats import LossStats, measure


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
    age_N: Tensor | None = None,
    start_logprobs_N: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """This micro-batch's share of the loss, with gradient through `logprobs_N` and `entropy_N`, and its statistics.

    All tensors are flat over the loss tokens (see Tokens). `start_logprobs_N` None: this is the first update of the
    step, which begins with its own log-probabilities. `age_N` None: all tokens are of age 0.
    `mask_truncated_completions` is the caller's: tokens of truncated rollouts are not among the N.
    Where `fresh_N` is False the token leaves loss, gradient, importance weights and statistics, whatever its values;
    it stays in the counts that divide, so that the other tokens weigh what they did. None: all are fresh.
    Without a fresh token the share is 0 and still hangs on the graph of `logprobs_N`, so that every rank has a backward
    pass.
    """
    tokens = Tokens(
        logprobs_N=logprobs_N,
        entropy_N=entropy_N,
        sampled_logprobs_N=sampled_logprobs_N,
        start_logprobs_N=logprobs_N.detach() if start_logprobs_N is None else start_logprobs_N,
        reference_logprobs_N=reference_logprobs_N,
        advantages_N=advantages_N,
        age_N=torch.zeros_like(sequence_N) if age_N is None else age_N,
        lengths_N=lengths(sequence_N, num_sequences, logprobs_N),
        sequence_N=sequence_N,
        num_sequences=num_sequences,
        num_tokens=len(logprobs_N),
    )
    tokens = replace(tokens, advantages_N=penalised(advantages_N, tokens, config, normalizer.kl_weight)).only(fresh_N)
    if len(tokens) == 0:
        return tokens.logprobs_N.sum() * 0.0, LossStats()
    return _loss(tokens, config, normalizer)


def _loss(tokens: Tokens, config: GrpoConfig, normalizer: Normalizer) -> tuple[Tensor, LossStats]:
    """-(surrogate) x weight + beta KL, averaged as `loss_type` says, - entropy_coef x mean entropy."""
    old_N = old_logprobs(tokens, config.old_logprobs)
    ratio_N = policy_ratio(tokens, old_N, config.importance_sampling_level)
    loss_N = surrogate(ratio_N, tokens.logprobs_N, tokens.advantages_N, config)
    weights = correction(tokens, old_N, config)
    if weights is not None:
        loss_N = loss_N * weights.weights_N
    kl_N = kl_term(tokens, ratio_N, config)
    if kl_N is not None and config.kl_penalty in ("k2", "k3"):
        loss_N = loss_N + config.beta * kl_N
    loss = share(loss_N, tokens, config.loss_type, normalizer)
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * tokens.entropy_N.sum() / normalizer.num_loss_tokens
    stats = measure(
        loss=loss,
        entropy_N=tokens.entropy_N,
        kl_N=kl_N,
        ratio_N=ratio_N,
        clip_range=clip_range(config),
        log_ratio_N=log_ratio(tokens.start_logprobs_N, tokens.sampled_logprobs_N),
        sampled_N=~tokens.sampled_logprobs_N.isnan(),
        advantages_N=tokens.advantages_N,
        sequence_N=tokens.sequence_N,
        num_sequences=tokens.num_sequences,
        weights=weights,
    )
    return loss, stats
