"""What a batch says of itself before it is trained, under TRL's names; a metric without a valid value is left out.

Legend: B = rollouts of the batch, G = rollouts of one group.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from algorithms.advantages import spread
from algorithms.types import GroupSummary


def reward_metrics(
    groups: Sequence[GroupSummary],
    *,
    version: int,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    max_staleness: int | None = None,
) -> dict[str, float]:
    """Every value is finite: NaN is never emitted, nor the infinity that a mean of huge rewards may be.

    `version` is the version that the policy trains at; tokens sampled more than `max_staleness` versions before it are
    masked, and none when that is None. `scale_rewards` decides, as in TRL, whether `frac_reward_zero_std` looks at the
    groups or at the batch. Besides TRL's: `staleness/mean`, `staleness/max` and `staleness/share/{age}` (of the trained
    tokens, by the versions that they trail), `staleness/masked` (share of the sampled tokens), `reward/unscorable`
    (rollouts without a reward), `reward/failures/{cause}` (failed reward calls).
    Where TRL writes 0 for want of a value (terminated lengths when every completion was truncated) nothing is written.
    """
    metrics = _rewards(groups, scale_rewards) | _lengths(groups) | _staleness(groups, version, max_staleness)
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def _rewards(groups: Sequence[GroupSummary], scale_rewards: str) -> dict[str, float | None]:
    rewards_B = [reward for group in groups for reward in group.rewards_G]
    metrics = {
        "reward": _mean(rewards_B),
        "reward_std": _std(rewards_B),
        "frac_reward_zero_std": _zero_std(groups, scale_rewards),
        "reward/unscorable": float(rewards_B.count(None)),
    }
    for name in sorted({name for group in groups for name in group.scores}):
        scores_B = [score for group in groups for score in group.scores.get(name, ())]
        metrics[f"rewards/{name}/mean"] = _mean(scores_B)
        metrics[f"rewards/{name}/std"] = _std(scores_B)
    for cause in sorted({cause for group in groups for cause in group.failures}):
        metrics[f"reward/failures/{cause}"] = float(sum(group.failures.get(cause, 0) for group in groups))
    return metrics


def _zero_std(groups: Sequence[GroupSummary], scale_rewards: str) -> float | None:
    """Fraction of the rollouts whose scaling standard deviation is 0; an undefined one counts as not 0, as in TRL."""
    if scale_rewards == "batch":
        stds = [_std([reward for group in groups for reward in group.rewards_G])]
        weights = [1]
    else:
        stds = [_std(group.rewards_G) for group in groups]
        weights = [len(group.rewards_G) for group in groups]
    zero = sum(weight for std, weight in zip(stds, weights, strict=True) if std is not None and std <= 1e-8)
    return zero / sum(weights) if groups else None


def _lengths(groups: Sequence[GroupSummary]) -> dict[str, float | None]:
    """Lengths of the completions in tokens that the policy sampled; terminated = not cut off by the length limit."""
    lengths_B = [length for group in groups for length in group.num_loss_tokens_G]
    truncated_B = [truncated for group in groups for truncated in group.truncated_G]
    terminated = [length for length, cut in zip(lengths_B, truncated_B, strict=True) if not cut]
    metrics = {"completions/clipped_ratio": _mean(truncated_B)}
    for infix, lengths in (("length", lengths_B), ("terminated_length", terminated)):
        metrics[f"completions/mean_{infix}"] = _mean(lengths)
        metrics[f"completions/min_{infix}"] = float(min(lengths)) if lengths else None
        metrics[f"completions/max_{infix}"] = float(max(lengths)) if lengths else None
    return metrics


def _staleness(groups: Sequence[GroupSummary], version: int, max_staleness: int | None) -> dict[str, float | None]:
    """Staleness (age) of a token = version it is trained at - version of the weights that sampled it."""
    tokens: dict[int, int] = {}
    for group in groups:
        for sampled_at, num_tokens in group.tokens_by_version.items():
            tokens[version - sampled_at] = tokens.get(version - sampled_at, 0) + num_tokens
    num_sampled = sum(tokens.values())
    trained = {age: tokens[age] for age in sorted(tokens) if max_staleness is None or age <= max_staleness}
    num_trained = sum(trained.values())
    metrics: dict[str, float | None] = {
        "staleness/mean": sum(age * count for age, count in trained.items()) / num_trained if num_trained else None,
        "staleness/max": float(max(trained)) if trained else None,
        "staleness/masked": 1 - num_trained / num_sampled if num_sampled else None,
    }
    return metrics | {f"staleness/share/{age}": count / num_trained for age, count in trained.items()}


def _known(values: Iterable[float | None]) -> NDArray[np.float64]:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _mean(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return float(known.mean()) if len(known) else None


def _std(values: Iterable[float | None]) -> float | None:
    return spread(_known(values))
