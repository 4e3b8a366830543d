"""Partitions of any weights keep their promises; small ones are held against the best there is."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.partition import partition

weights = st.lists(st.integers(0, 1000), max_size=60)


@settings(deadline=None)
@given(weights, st.integers(1, 12))
def test_any_partition(items: list[int], num_parts: int) -> None:
    parts = partition(items, num_parts)
    assert len(parts) == num_parts
    assert sorted(index for part in parts for index in part) == list(range(len(items)))
    loads = [sum(items[index] for index in part) for part in parts]
    assert loads == sorted(loads, reverse=True)
    assert max(loads) - min(loads) <= max(items, default=0)
    assert partition(items, num_parts) == parts, "the same arguments, the same parts"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(2, 3))
def test_the_heaviest_part_is_within_a_third_of_the_best(items: list[int], num_parts: int) -> None:
    best = min(
        max(sum(weight for weight, part in zip(items, parts, strict=True) if part == number) for number in set(parts))
        for parts in product(range(num_parts), repeat=len(items))
    )
    heaviest = sum(items[index] for index in partition(items, num_parts)[0])
    assert best <= heaviest
    # 4/3 - 1/(3 num_parts), in integers: 12, 12, 8, 8, 8 in two parts is just that far from the best.
    assert 3 * num_parts * heaviest <= (4 * num_parts - 1) * best


@pytest.mark.parametrize(
    ("items", "num_parts", "loads"),
    [
        ([8, 7, 6, 5, 4], 2, [16, 14]),  # largest first to the least loaded makes 17 and 13
        ([5, 5, 4, 4, 3, 3, 1], 3, [9, 8, 8]),
        ([], 2, [0, 0]),
        ([3], 3, [3, 0, 0]),
        ([3, 1, 2], 1, [6]),
        ([8, 8, 8, 12, 12], 2, [28, 20]),
    ],
)
def test_by_hand(items: list[int], num_parts: int, loads: list[int]) -> None:
    assert [sum(items[index] for index in part) for part in partition(items, num_parts)] == loads


def test_thousands_of_items_and_hundreds_of_parts_take_a_moment() -> None:
    items = np.random.default_rng(0).lognormal(6.5, 1.0, 8192).tolist()
    loads = [sum(items[index] for index in part) for part in partition(items, 256)]
    assert max(loads) / np.mean(loads) <= max(1.001, max(items) / np.mean(loads))
