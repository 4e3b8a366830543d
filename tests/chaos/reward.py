"""A reward function that misbehaves when it is told to."""

from typing import Any

from tests.chaos.faults import strike
from tests.chaos.tokens import reward_of


def score(completions: list[str], **columns: Any) -> list[float]:
    rewards = [reward_of(text) for text in completions]
    match strike("function", "call"):
        case "nan":
            return [float("nan")] * len(rewards)
        case "short":
            return rewards[:-1]
    return rewards
