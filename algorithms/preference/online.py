"""Of each group the best and the worst rollout are a preference; a group without a difference prefers nothing.

What is minimised is DPO's loss of these pairs (arXiv 2402.04792), as TRL's OnlineDPOTrainer computes it: `ipo` compares
whole completions there, not their mean per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from algorithms.preference.batch import Pairs
from algorithms.preference.config import DpoConfig, OnlineDpoConfig
from algorithms.preference.weigh import weigh_pairs
from algorithms.types import GroupSummary


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """Of the batch's group `group`, two of its rollouts."""

    group: int
    chosen: int
    rejected: int


def sampled_pairs(groups: Sequence[GroupSummary], mask_truncated: bool) -> list[PlacedPair]:
    """The first of the best and the first of the worst of each group whose rewards, those there are, differ."""
    pairs = []
    for place, group in enumerate(groups):
        known = {
            rollout: reward
            for rollout, reward in enumerate(group.rewards_G)
            if reward is not None and not (mask_truncated and group.truncated_G[rollout])
        }
        if len(set(known.values())) > 1:
            best, worst = (extreme(known, key=lambda rollout: known[rollout]) for extreme in (max, min))
            pairs.append(PlacedPair(place, best, worst))
    return pairs


def pair_weights(
    pairs: Sequence[PlacedPair],
    logprobs: Mapping[tuple[int, int], float],
    reference: Mapping[tuple[int, int], float],
    num_tokens: Mapping[tuple[int, int], int],
    config: OnlineDpoConfig,
    beta: float,
) -> tuple[dict[tuple[int, int], float], dict[str, float]]:
    """d loss / d log-probability of each sequence of the pairs, by group and rollout, and the metrics; of none, none.

    `logprobs` and `reference`: log-probability of each sequence, summed over its tokens.
    """
    if not pairs:
        return {}, {"loss": 0.0, "pairs": 0.0}
    sides = [[(pair.group, pair.chosen) for pair in pairs], [(pair.group, pair.rejected) for pair in pairs]]
    mine, theirs = (
        [torch.tensor([numbers[at] for at in side], dtype=torch.float64) for side in sides]
        for numbers in (logprobs, reference)
    )
    ones_P = torch.ones(len(pairs), dtype=torch.float64)  # whole completions are compared
    found = weigh_pairs(
        Pairs(mine[0], mine[1], ones_P, ones_P, theirs[0], theirs[1]),
        DpoConfig(loss_type=(config.loss_type,), beta=beta),
    )
    weights = {at: found.weights[place][one] for one, side in enumerate(sides) for place, at in enumerate(side)}
    asked = [*sides[0], *sides[1]]
    kl = sum(logprobs[at] - reference[at] for at in asked) / sum(num_tokens[at] for at in asked)
    return weights, {"loss": found.loss, "pairs": float(len(pairs)), "kl": kl, **found.metrics}
