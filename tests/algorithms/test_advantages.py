"""Advantages against hand-worked groups, and the invariants for any group."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.advantages import advantages

SQRT2 = math.sqrt(2.0)
rewards = st.one_of(st.none(), st.floats(-100, 100))
batches = st.lists(st.lists(rewards, min_size=1, max_size=8), max_size=5)
scales = st.sampled_from(["group", "batch", "none"])


@pytest.mark.parametrize(
    ("groups", "scale", "expected"),
    [
        ([[0.0, 2.0]], "none", [(-1.0, 1.0)]),
        ([[0.0, 2.0]], "group", [(-1 / (SQRT2 + 1e-4), 1 / (SQRT2 + 1e-4))]),
        # Values 0, 2, 1, 1 have mean 1 and unbiased variance 2/3.
        ([[0.0, 2.0], [1.0, 1.0]], "batch", [(-1 / (math.sqrt(2 / 3) + 1e-4), 1 / (math.sqrt(2 / 3) + 1e-4)), (0, 0)]),
        ([[0.0, None, 2.0]], "none", [(-1.0, 0.0, 1.0)]),
        ([[None, 5.0, None]], "group", [(0.0, 0.0, 0.0)]),
        ([[None, 5.0], [1.0, 2.0]], "batch", [(0.0, 0.0), (-0.5 / (2.081666 + 1e-4), 0.5 / (2.081666 + 1e-4))]),
        ([[None, None]], "batch", [(0.0, 0.0)]),
        ([[0.1] * 3], "group", [(0.0, 0.0, 0.0)]),
        ([], "batch", []),
    ],
)
def test_by_hand(groups: list, scale: str, expected: list) -> None:
    result = advantages(groups, scale)
    assert len(result) == len(expected)
    for ours, hand in zip(result, expected, strict=True):
        assert ours == pytest.approx(hand, abs=1e-6)


@settings(deadline=None)
@given(batches, scales)
def test_a_groups_advantages_sum_to_zero_and_the_unscorable_get_exactly_zero(groups: list, scale: str) -> None:
    for group, result in zip(groups, advantages(groups, scale), strict=True):
        assert len(result) == len(group)
        assert math.fsum(result) == pytest.approx(0.0, abs=1e-6)
        assert all(value == 0.0 for reward, value in zip(group, result, strict=True) if reward is None)


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), scales)
def test_an_unscorable_rollout_leaves_the_others_as_they_were(group: list, scale: str) -> None:
    assert advantages([[*group, None]], scale)[0][:-1] == advantages([group], scale)[0]


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(1, 8), scales)
def test_equal_rewards_give_exactly_zero(reward: float, size: int, scale: str) -> None:
    assert advantages([[reward] * size, [0.0, 1.0]], scale)[0] == (0.0,) * size


def test_a_reward_that_is_not_finite_is_refused() -> None:
    with pytest.raises(AssertionError, match="finite"):
        advantages([[1.0, math.nan]], "group")
