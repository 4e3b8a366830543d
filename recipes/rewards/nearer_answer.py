"""A judge for tasks with an `answer`: of two completions the one that has more of its letters in their places."""

from collections.abc import Sequence


def nearer_answer(prompts: Sequence[str], pairs: Sequence[Sequence[str]], answer: Sequence[str]) -> list[int | None]:
    """None where both are as near."""
    return [_nearer(pair, expected) for pair, expected in zip(pairs, answer, strict=True)]


def _nearer(pair: Sequence[str], expected: str) -> int | None:
    first, second = (sum(a == b for a, b in zip(one.strip(), expected, strict=False)) for one in pair)
    return None if first == second else int(second > first)
