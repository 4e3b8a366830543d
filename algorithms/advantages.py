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


def advantages(
    rewards: Sequence[Sequence[float | None]], scale_rewards: Literal["group", "batch", "none"]
) -> list[tuple[float, ...]]:
    """Every group's advantages sum to 0 over its scorable rollouts; unscorable ones (None) get exactly 0.

    `rewards` holds one inner sequence per group; groups may differ in size. The baseline is the group's mean. The
    scale is the unbiased standard deviation of the group, of the batch, or 1 (`none`: Dr. GRPO, arXiv 2503.20783).
    A group with fewer than two scorable rewards gets 0: its only reward is its own baseline. TRL arrives at the same
    number through `nanstd`, which is NaN for one value, so that its advantage is 0 / NaN and NaN is replaced by 0.
    Source: DeepSeekMath (arXiv 2402.03300), as TRL's GRPOTrainer computes it with `sum_then_normalize`.
    """
    scorable = [np.array([r for r in group if r is not None], dtype=np.float64) for group in rewards]
    for group_G in scorable:
        assert np.isfinite(group_G).all(), f"a reward is finite or None, got {group_G.tolist()}"
    batch_std = spread(np.concatenate(scorable)) if scorable else None
    result = []
    for group, group_G in zip(rewards, scorable, strict=True):
        std = spread(group_G)
        if not std:
            result.append((0.0,) * len(group))
            continue
        assert batch_std is not None, "the batch holds at least this group's rewards"
        divisor = {"group": std + EPSILON, "batch": batch_std + EPSILON, "none": 1.0}[scale_rewards]
        baseline = float(group_G.mean())
        result.append(tuple(0.0 if reward is None else (reward - baseline) / divisor for reward in group))
    return result


def spread(values_B: NDArray[np.float64]) -> float | None:
    """The unbiased standard deviation; None for fewer than two values, exactly 0 for equal ones."""
    if len(values_B) < 2:
        return None
    # The mean of equal values need not equal them in floating point; 0 must stay 0 whatever the value.
    if values_B.min() == values_B.max():
        return 0.0
    return math.sqrt(float(values_B.var(ddof=1)))
