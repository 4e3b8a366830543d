"""What the rewards of a batch say about each of its tokens: an advantage per rollout, and a weight of the KL per token.

A token of rollout i is worth  advantages_i - kl_weight x (its KL estimate, which the policy ranks have: losses/kl.py).

Legend: B = rollouts of the batch that have something to compare their reward with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from algorithms.advantages import EPSILON, advantages, compared, spread
from algorithms.config import GrpoConfig
from algorithms.overlong import soft_overlong_punishment
from algorithms.types import GroupSummary, KlSums


@dataclass(frozen=True, slots=True)
class Signal:
    """Rollouts without a reward have advantage 0: they are not rewarded, and the KL penalty holds for them too.

    Where the advantages are divided by their spread and there is none, nothing is said, of the KL either.
    """

    advantages: Sequence[Sequence[float | None]]
    """One inner sequence for each group; a rollout with None is left out of the batch."""
    kl_weight: float


def signal(groups: Sequence[GroupSummary], config: GrpoConfig, max_completion_length: int) -> Signal:
    """From the rewards as they were given, through the penalties, the baseline and the scale that the recipe names."""
    rewards = penalised_rewards(groups, config, max_completion_length)
    in_advantage = config.kl_penalty in ("reward_to_go", "advantage")
    if config.normalize_advantages == "none":
        weight = config.beta if in_advantage else 0.0
        return Signal(advantages(rewards, config.scale_rewards, config.baseline), weight)
    values = compared(rewards, config.baseline)
    mean, std = _moments(groups, values, config)
    scaled = [tuple(0.0 if a is None or not std else (a - mean) / (std + EPSILON) for a in group) for group in values]
    match config.kl_penalty:
        case "reward_to_go":
            return Signal(scaled, config.beta / (std + EPSILON) if std else 0.0)
        case "advantage":
            return Signal(scaled, config.beta)
        case _:
            return Signal(scaled, 0.0)


def penalised_rewards(
    groups: Sequence[GroupSummary], config: GrpoConfig, max_completion_length: int
) -> list[list[float | None]]:
    """The rewards of each group after the penalties of whole rollouts; None where there is no reward."""
    return [_penalised(group, config, max_completion_length) for group in groups]


def _penalised(group: GroupSummary, config: GrpoConfig, max_completion_length: int) -> list[float | None]:
    """The group's rewards, less what their length and, with `kl_penalty: reward`, their KL divergence cost.

    With a critic the latter is a matter of each token (gae.py).
    """
    rewards = list(group.rewards_G)
    for number, reward in enumerate(rewards):
        if reward is None:
            continue
        if config.soft_punish_cache is not None:
            length = group.num_loss_tokens_G[number]
            reward += soft_overlong_punishment(length, max_completion_length, config.soft_punish_cache)
        if config.missing_eos_penalty is not None and group.truncated_G[number]:
            reward -= config.missing_eos_penalty
        if config.kl_penalty == "reward" and config.advantage == "group":
            reward -= config.beta * group.kl_G[number].total
        rewards[number] = reward
    return rewards


def _moments(
    groups: Sequence[GroupSummary], values: Sequence[Sequence[float | None]], config: GrpoConfig
) -> tuple[float, float]:
    """Mean and unbiased standard deviation of the advantages, over the rollouts or over the tokens; 0, 0 of too few.

    Tokens of rollouts that `mask_truncated_completions` leaves out do not count, as in a mean over tokens.
    """
    leaves_out = config.mask_truncated_completions and config.normalize_advantages == "tokens"
    known = [
        (value, group.num_loss_tokens_G[number], group.kl_G[number] if group.kl_G else KlSums())
        for group, of_group in zip(groups, values, strict=True)
        for number, value in enumerate(of_group)
        if value is not None and not (leaves_out and group.truncated_G[number])
    ]
    values_B = np.array([value for value, _, _ in known], dtype=np.float64)
    if config.normalize_advantages == "rollouts" or not known:
        return (float(values_B.mean()) if known else 0.0), (spread(values_B) or 0.0)
    lengths_B = np.array([length for _, length, _ in known], dtype=np.float64)
    beta = config.beta if config.kl_penalty == "reward_to_go" else 0.0
    return _token_moments(values_B, lengths_B, [kl for _, _, kl in known], beta)


def _token_moments(
    values_B: NDArray[np.float64], lengths_B: NDArray[np.float64], kl: Sequence[KlSums], beta: float
) -> tuple[float, float]:
    """The same over tokens: sums over each rollout's tokens of a - beta c and of its square, c being its KL to go."""
    kl_B = np.array([sums.to_go for sums in kl])
    squares_B = np.array([sums.to_go_squared for sums in kl])
    num_tokens = lengths_B.sum()
    if num_tokens < 2:
        return 0.0, 0.0
    # Around the mean of the rollouts, so that little is lost where the mean is far from 0.
    centre = float(values_B.mean())
    offset_B = values_B - centre
    mean = (lengths_B * offset_B - beta * kl_B).sum() / num_tokens
    square = (lengths_B * offset_B**2 - 2 * beta * offset_B * kl_B + beta**2 * squares_B).sum()
    variance = (square - num_tokens * mean**2) / (num_tokens - 1)
    return centre + float(mean), math.sqrt(max(0.0, float(variance)))
