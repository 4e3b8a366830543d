"""A reward function that misbehaves when it is told to."""

import sys
from typing import Any

from tests.chaos.faults import reward_of, strike

_FLOOD = 4 * 2**20


def score(completions: list[str], **columns: Any) -> list[float]:
    rewards = [reward_of(text) for text in completions]
    match strike("function", "call"):
        case "nan":
            return [float("nan")] * len(rewards)
        case "short":
            return rewards[:-1]
        case "flood":
            for stream in (sys.stdout, sys.stderr):
                stream.write("x" * _FLOOD)
                stream.flush()
    return rewards
