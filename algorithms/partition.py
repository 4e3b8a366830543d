"""Parts of a multiset whose heaviest and lightest differ by at most the heaviest item, and in practice by far less."""

import heapq
from collections.abc import Sequence

_Items = int | tuple["_Items", "_Items"]
"""One index, or two sets of them that were put together: joined in constant time, however large they are."""
_Parts = tuple[tuple[float, _Items], ...]
"""The parts that are not empty, heaviest first, each with its weight."""


def partition(weights: Sequence[float], num_parts: int) -> list[list[int]]:
    """Every index in one of `num_parts` parts of nearly the same weight, in ascending order; heaviest part first.

    The largest differencing method (Karmarkar and Karp 1982): the two partitions of which the heaviest and the lightest
    part differ most become one, heaviest to lightest, until one is left. The heaviest part weighs at most
    4/3 - 1/(3 num_parts) of what it must (Michiels, Korst and Aarts 2003). Weights are not negative.
    """
    assert num_parts > 0, f"got {num_parts} parts"
    assert min(weights, default=0) >= 0, "a weight is not negative"
    if not weights:
        return [[] for _ in range(num_parts)]
    if num_parts == 1:
        return [list(range(len(weights)))]
    # The number behind the difference makes the order, and so the result, a function of the arguments alone.
    heap: list[tuple[float, int, _Parts]] = [
        (-weight, index, ((weight, index),)) for index, weight in enumerate(weights)
    ]
    heapq.heapify(heap)
    for number in range(len(weights), 2 * len(weights) - 1):
        *_, first = heapq.heappop(heap)
        *_, second = heapq.heappop(heap)
        joined = _joined(first, second, num_parts)
        lightest = joined[-1][0] if len(joined) == num_parts else 0
        heapq.heappush(heap, (lightest - joined[0][0], number, joined))
    parts = [_indices(items) for _, items in heap[0][2]]
    return parts + [[] for _ in range(num_parts - len(parts))]


def _joined(first: _Parts, second: _Parts, num_parts: int) -> _Parts:
    """The heaviest part of one goes with the lightest of the other, and so on; only what must share a part does."""
    alone_first, alone_second = num_parts - len(second), num_parts - len(first)
    if alone_second >= len(second):
        parts = [*first, *second]
    else:
        shared = zip(first[alone_first:], reversed(second[alone_second:]), strict=True)
        parts = [*first[:alone_first], *second[:alone_second]]
        parts += [(left + right, (a, b)) for (left, a), (right, b) in shared]
    return tuple(sorted(parts, key=lambda part: -part[0]))


def _indices(items: _Items) -> list[int]:
    found: list[int] = []
    waiting = [items]
    while waiting:
        match waiting.pop():
            case (first, second):
                waiting += (first, second)
            case int(index):
                found.append(index)
    return sorted(found)
