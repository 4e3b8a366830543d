"""A group is left out for one named cause or trained; the verdict is a pure function of its rewards."""

from typing import Literal

import numpy as np

from algorithms.advantages import spread
from algorithms.config import FilterConfig
from algorithms.types import GroupSummary

Cause = Literal["unscorable", "zero_std", "reward_too_low", "reward_too_high"]

ZERO_STD = 1e-8
"""Standard deviations up to this count as 0; TRL's tolerance."""


def verdict(summary: GroupSummary, config: FilterConfig | None) -> Cause | None:
    """Why the filter leaves the group out; None to train on it, which is always so without a filter.

    Rollouts without a reward are ignored; a group of nothing else is `unscorable`. A single reward is its own baseline,
    so its advantage is 0, and the group has no spread (DAPO, arXiv 2503.14476, for dynamic sampling).
    """
    if config is None:
        return None
    known = np.array([reward for reward in summary.rewards_G if reward is not None], dtype=np.float64)
    if len(known) == 0:
        return "unscorable"
    match config.kind:
        case "zero_std":
            return "zero_std" if (spread(known) or 0.0) <= ZERO_STD else None
        case "reward_band":
            mean = float(known.mean())
            if mean < config.min:
                return "reward_too_low"
            return "reward_too_high" if mean > config.max else None
