"""Judges for whole runs."""

from collections.abc import Sequence


def first(prompts: Sequence[str], pairs: Sequence[Sequence[str]]) -> list[int | None]:
    """Whichever stands first, which is as good as random."""
    return [0 for _ in pairs]
