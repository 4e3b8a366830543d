"""Rewards that both sides of the comparison load: cheap to compute, and one of them slow to come."""

import asyncio
import math
import random
import zlib

MEAN_S, SIGMA, LONGEST_S = 1.0, 1.0, 15.0
"""A lognormal wait for each completion."""


def lower_case(completions: list[str], **kwargs: object) -> list[float]:
    """The share of a completion's characters that are lower-case letters.

    >>> lower_case(["abc", "aB1?", ""])
    [1.0, 0.25, 0.0]
    """
    return [sum("a" <= letter <= "z" for letter in text) / max(1, len(text)) for text in completions]


async def lower_case_slowly(completions: list[str], **kwargs: object) -> list[float]:
    """The same, each after a wait of its own, all of a call at a time: as one asks a judge or a sandbox."""
    await asyncio.gather(*(asyncio.sleep(wait_s(text)) for text in completions))
    return lower_case(completions)


def wait_s(text: str) -> float:
    """How long this completion takes to be judged: the same whoever asks."""
    drawn = random.Random(zlib.crc32(text.encode())).lognormvariate(math.log(MEAN_S) - SIGMA**2 / 2, SIGMA)
    return min(LONGEST_S, drawn)
