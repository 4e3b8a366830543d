"""Advantages compare the rollouts of one group; a rollout without a reward moves neither policy nor baseline.

Legend: G = rollouts of one group, B = rollouts of the batch (all groups).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-4
"""Added to the standard deviation that divides; TRL's value."""


Rewards = Sequence[Sequence[float | None]]
"""Of the rollouts of each group; None is unscorable. Groups may differ in size."""


def advantages(
    rewards: Rewards,
    scale_rewards: Literal["group", "batch", "none"],
    baseline: Literal["group", "leave_one_out", "none"] = "group",
) -> list[tuple[float, ...]]:
    """What each reward is above its baseline, over the scale; unscorable rollouts (None) get exactly 0.

    The baseline is the group's mean, so that each group's advantages sum to 0; or the mean of the others of the group
    (RLOO, arXiv 2402.14740); or 0. The scale is the unbiased standard deviation of the group's rewards, of the batch's,
    or 1 (`none`: Dr. GRPO, arXiv 2503.20783).
    Source: DeepSeekMath (arXiv 2402.03300), as TRL's GRPOTrainer computes it with `sum_then_normalize`.
    """
    measured = [_measured(group, baseline) for group in rewards]
    divisors = _divisors(rewards, scale_rewards)
    return [
        tuple(0.0 if value is None else value / divisor for value in group)
        for group, divisor in zip(measured, divisors, strict=True)
    ]


def compared(rewards: Rewards, baseline: Literal["group", "leave_one_out", "none"]) -> list[tuple[float | None, ...]]:
    """What each reward is above its baseline; None where there is nothing to compare."""
    return [_measured(group, baseline) for group in rewards]


def _measured(group: Sequence[float | None], baseline: str) -> tuple[float | None, ...]:
    """A group with fewer than two scorable rewards has no baseline: its only reward would be its own.

    TRL arrives at the same 0 through `nanstd` (or 0 / 0), which is NaN for one value, and NaN is replaced by 0.
    """
    known_G = np.array([reward for reward in group if reward is not None], dtype=np.float64)
    assert np.isfinite(known_G).all(), f"a reward is finite or None, got {known_G.tolist()}"
    if baseline == "none":
        return tuple(group)
    std = spread(known_G)
    if std is None:
        return (None,) * len(group)
    if std == 0:
        return tuple(None if reward is None else 0.0 for reward in group)
    if baseline == "group":
        mean = float(known_G.mean())
        return tuple(None if reward is None else reward - mean for reward in group)
    total, num_others = float(known_G.sum()), len(known_G) - 1
    return tuple(None if reward is None else reward - (total - reward) / num_others for reward in group)


def _divisors(rewards: Rewards, scale_rewards: str) -> list[float]:
    """One for each group; 1 where there is no spread, for then there is nothing to scale."""
    if scale_rewards == "none":
        return [1.0] * len(rewards)
    known = [np.array([reward for reward in group if reward is not None], dtype=np.float64) for group in rewards]
    if scale_rewards == "batch":
        known = [np.concatenate(known)] * len(known) if known else []
    return [1.0 if std is None else std + EPSILON for std in map(spread, known)]


def spread(values_B: NDArray[np.float64]) -> float | None:
    """The unbiased standard deviation; None for fewer than two values, exactly 0 for equal ones."""
    if len(values_B) < 2:
        return None
    # The mean of equal values need not equal them in floating point; 0 must stay 0 whatever the value.
    if values_B.min() == values_B.max():
        return 0.0
    return math.sqrt(float(values_B.var(ddof=1)))
