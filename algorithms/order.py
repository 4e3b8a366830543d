"""Within an epoch each row comes exactly once, and the row of an ordinal depends on (ordinal, num_rows, seed) alone.

So a run resumes from one number: no sampler state, no list of indices, the same order on every rank and machine.
"""

from hashlib import blake2b
from math import isqrt

NUM_ROUNDS = 8
"""Rounds of the Feistel network; four already pass as random on large domains, the small ones want more."""


def row_of(ordinal: int, num_rows: int, seed: int, shuffle: bool) -> tuple[int, int]:
    """The (epoch, row) of an ordinal: for each epoch, `ordinal -> row` is a bijection onto `range(num_rows)`.

    With `shuffle` each epoch has its own permutation, computed for this ordinal alone in O(1) memory; without it the
    rows come in their own order.
    """
    assert ordinal >= 0, f"ordinals count from 0, got {ordinal}"
    assert num_rows >= 1, f"there is no row to take from {num_rows} rows"
    epoch, position = divmod(ordinal, num_rows)
    return epoch, permute(position, num_rows, key=f"{seed}/{epoch}") if shuffle else position


def permute(position: int, size: int, key: str) -> int:
    """A bijection of `range(size)` chosen by `key`: a Feistel network over a x b >= size values, walked back inside.

    Generalised Feistel with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The
    network permutes a domain that is larger than `size` by less than 2 * sqrt(size) + 1, so the walk is short.
    """
    assert 0 <= position < size, f"position {position} is not one of {size}"
    a = isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = divmod(position, b)
        for round_index in range(0, NUM_ROUNDS, 2):
            left = (left + _digest(f"{key}/{round_index}/{right}")) % a
            right = (right + _digest(f"{key}/{round_index + 1}/{left}")) % b
        position = left * b + right
        if position < size:
            return position


def _digest(text: str) -> int:
    """64 bits that depend on the text alone; Python's own hash() changes with the process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
