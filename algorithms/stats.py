"""What the losses of a batch measure: merging in any order, over micro-batches and ranks, gives the same statistics.

Legend: N = loss tokens of the micro-batch, S = its sequences.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from algorithms.corrections import ImportanceWeights, sequence_sum


@dataclass(frozen=True, slots=True)
class LossStats:
    """A field in `_min` or `_max` merges by minimum or maximum, every other by sum; `LossStats()` is neutral."""

    loss: float = 0.0
    """This share of the loss of the global batch."""
    num_tokens: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0
    num_kl_tokens: float = 0.0
    low_clipped: float = 0.0
    """Tokens whose ratio lies under the clip range while their advantage is negative."""
    high_clipped: float = 0.0
    """Tokens whose ratio lies over the clip range while their advantage is positive."""
    num_ratio_tokens: float = 0.0
    low_clipped_min: float = math.inf
    """Smallest low-clipped fraction of a sequence."""
    high_clipped_max: float = -math.inf
    """Largest high-clipped fraction of a sequence."""
    logp_difference: float = 0.0
    """|current - sampled log-probability|, over the tokens whose sampled one is known."""
    logp_difference_max: float = -math.inf
    sampling_kl: float = 0.0
    """sampled - current log-probability, over the same tokens."""
    num_sampled_tokens: float = 0.0
    token_weight: float = 0.0
    """exp(current - sampled log-probability) of each token, neither truncated nor masked."""
    token_weight_squared: float = 0.0
    weight: float = 0.0
    """Importance weights as they were applied, one per token or per sequence by the mode."""
    num_weights: float = 0.0
    weight_min: float = math.inf
    weight_max: float = -math.inf
    rejected: float = 0.0
    """Tokens that a mask took out of the policy term."""
    num_maskable_tokens: float = 0.0
    """Tokens to which a weight or a mask was applied."""
    num_value_tokens: float = 0.0
    """Tokens of which a critic has learned; the following are sums over them."""
    value_clipped: float = 0.0
    """Those whose value has gone too far from the old one to count."""
    values: float = 0.0
    """Before the step."""
    returns: float = 0.0
    returns_squared: float = 0.0
    value_misses: float = 0.0
    """return - value."""
    value_misses_squared: float = 0.0

    def finish(self) -> dict[str, float]:
        """The metrics under TRL's names; one without a finite value is left out.

        Ours: `sampling/ess`, the effective sample size of the token weights as a fraction of the tokens,
        (sum w)^2 / (n sum w^2), 1 on policy; `sampling/kl`, the estimate k1 of KL(sampled || current), 0 on policy;
        `sampling/rejected`, the share of the tokens that masks took out of the policy term. "Current" is the policy
        when the step began. Of a critic: `value/explained_variance`, the share of the returns' variance that its values
        knew before the step, `value/clip_fraction`, `value/mean` and `value/return_mean`. Means are over the
        tokens of everything merged, where TRL averages over ranks, micro-batches or, of ratios per sequence, over
        sequences.
        """
        means = {
            "entropy": (self.entropy, self.num_tokens),
            "kl": (self.kl, self.num_kl_tokens),
            "clip_ratio/low_mean": (self.low_clipped, self.num_ratio_tokens),
            "clip_ratio/high_mean": (self.high_clipped, self.num_ratio_tokens),
            "clip_ratio/region_mean": (self.low_clipped + self.high_clipped, self.num_ratio_tokens),
            "sampling/sampling_logp_difference/mean": (self.logp_difference, self.num_sampled_tokens),
            "sampling/importance_sampling_ratio/mean": (self.weight, self.num_weights),
            "sampling/ess": (self.token_weight**2, self.num_ratio_tokens * self.token_weight_squared),
            "sampling/kl": (self.sampling_kl, self.num_sampled_tokens),
            "sampling/rejected": (self.rejected, self.num_maskable_tokens),
            "value/clip_fraction": (self.value_clipped, self.num_value_tokens),
            "value/mean": (self.values, self.num_value_tokens),
            "value/return_mean": (self.returns, self.num_value_tokens),
        }
        extremes = {
            "clip_ratio/low_min": self.low_clipped_min,
            "clip_ratio/high_max": self.high_clipped_max,
            "sampling/sampling_logp_difference/max": self.logp_difference_max,
            "sampling/importance_sampling_ratio/min": self.weight_min,
            "sampling/importance_sampling_ratio/max": self.weight_max,
        }
        metrics = {name: total / count for name, (total, count) in means.items() if count} | extremes
        metrics["value/explained_variance"] = self._explained_variance()
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _explained_variance(self) -> float:
        """1 - Var(return - value) / Var(return); NaN where the returns do not vary."""
        count = self.num_value_tokens
        if not count:
            return math.nan
        of_returns = self.returns_squared / count - (self.returns / count) ** 2
        of_misses = self.value_misses_squared / count - (self.value_misses / count) ** 2
        return 1 - of_misses / of_returns if of_returns > 1e-12 else math.nan

    def to_dict(self) -> dict[str, float]:
        """Plain floats by field name, so that a rank can send them; `from_dict` gives the same statistics back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> "LossStats":
        return cls(**values)


def merge(stats: Iterable[LossStats]) -> LossStats:
    """The statistics of the union; of nothing, the neutral `LossStats()`."""
    parts = [LossStats(), *stats]
    merged = {}
    for field in fields(LossStats):
        values = [getattr(part, field.name) for part in parts]
        if field.name.endswith("_min"):
            merged[field.name] = min(values)
        elif field.name.endswith("_max"):
            merged[field.name] = max(values)
        else:
            merged[field.name] = sum(values)
    return LossStats(**merged)


@torch.no_grad()
def measure(
    *,
    loss: Tensor,
    entropy_N: Tensor,
    kl_N: Tensor | None,
    ratio_N: Tensor,
    clip_range: tuple[float, float],
    log_ratio_N: Tensor,
    sampled_N: Tensor,
    advantages_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    weights: ImportanceWeights | None,
) -> LossStats:
    """The statistics of one micro-batch, N at least 1; the device is read once.

    `log_ratio_N` is log of the current over the sampled probability, 0 where `sampled_N` says that the latter is
    unknown; `weights` is what has multiplied the policy term, if anything.
    """
    num_tokens, log_ratio_N = len(entropy_N), log_ratio_N.double()
    scalars = {
        "loss": loss,
        "entropy": entropy_N.double().sum(),
        **_clipping(ratio_N, clip_range, advantages_N, sequence_N, num_sequences),
        "logp_difference": log_ratio_N.abs().sum(),
        "logp_difference_max": torch.where(sampled_N, log_ratio_N.abs(), -math.inf).max(),
        "sampling_kl": -log_ratio_N.sum(),
        "num_sampled_tokens": sampled_N.sum(),
        "token_weight": log_ratio_N.exp().sum(),
        "token_weight_squared": (2 * log_ratio_N).exp().sum(),
    }
    if kl_N is not None:
        scalars["kl"] = kl_N.double().sum()
    if weights is not None:
        scalars["rejected"] = (weights.weights_N == 0).sum()
    weights_U = None if weights is None else weights.weights_U
    if weights_U is not None:
        scalars |= {"weight": weights_U.double().sum(), "weight_min": weights_U.min(), "weight_max": weights_U.max()}
    values = torch.stack([scalar.double() for scalar in scalars.values()]).tolist()
    return LossStats(
        num_tokens=num_tokens,
        num_ratio_tokens=num_tokens,
        num_kl_tokens=0 if kl_N is None else num_tokens,
        num_weights=0 if weights_U is None else len(weights_U),
        num_maskable_tokens=0 if weights is None else num_tokens,
        **dict(zip(scalars, values, strict=True)),
    )


def _clipping(
    ratio_N: Tensor, clip_range: tuple[float, float], advantages_N: Tensor, sequence_N: Tensor, num_sequences: int
) -> dict[str, Tensor]:
    """How often the clip range cuts the gradient off, over the tokens and in the extreme sequence."""
    low, high = clip_range
    low_N = ((ratio_N < low) & (advantages_N < 0)).double()
    high_N = ((ratio_N > high) & (advantages_N > 0)).double()
    tokens_S = sequence_sum(torch.ones_like(low_N), sequence_N, num_sequences)
    low_S, high_S = (sequence_sum(clipped_N, sequence_N, num_sequences) / tokens_S for clipped_N in (low_N, high_N))
    return {
        "low_clipped": low_N.sum(),
        "high_clipped": high_N.sum(),
        "low_clipped_min": torch.where(tokens_S > 0, low_S, math.inf).min(),
        "high_clipped_max": torch.where(tokens_S > 0, high_S, -math.inf).max(),
    }
