"""Verdicts by hand, and every group that is kept has something to learn from."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.advantages import advantages
from algorithms.config import FilterConfig, RewardBandFilter, ZeroStdFilter
from algorithms.filters import verdict
from algorithms.types import GroupSummary

ZERO_STD = ZeroStdFilter(kind="zero_std")
BAND = RewardBandFilter(kind="reward_band", min=0.25, max=0.75)


def summary(rewards: tuple[float | None, ...]) -> GroupSummary:
    size = len(rewards)
    return GroupSummary(
        ordinal=0,
        epoch=0,
        attempt=0,
        replica=0,
        num_tokens_G=(5,) * size,
        num_loss_tokens_G=(3,) * size,
        num_prompt_tokens=2,
        truncated_G=(False,) * size,
        tokens_by_version_G=({0: 3},) * size,
        rewards_G=rewards,
        scores={},
        failures={},
        generate_s=0.0,
        score_s=0.0,
    )


@pytest.mark.parametrize(
    ("config", "rewards", "expected"),
    [
        (None, (1.0, 1.0), None),
        (None, (None, None), None),
        (ZERO_STD, (0.3, 0.3, 0.3), "zero_std"),
        (ZERO_STD, (0.3, 0.3 + 1e-9), "zero_std"),
        (ZERO_STD, (0.3, 0.3 + 1e-7), None),
        (ZERO_STD, (1.0, 0.0), None),
        (ZERO_STD, (1.0, None, 0.0), None),
        (ZERO_STD, (1.0, None, 1.0), "zero_std"),
        (ZERO_STD, (1.0, None), "zero_std"),
        (ZERO_STD, (None, None), "unscorable"),
        (BAND, (0.0, 0.0, 0.5), "reward_too_low"),
        (BAND, (1.0, 1.0, 0.5), "reward_too_high"),
        (BAND, (0.25, 0.25), None),
        (BAND, (0.75, 0.75), None),
        (BAND, (0.0, None, 1.0), None),
        (BAND, (None, None), "unscorable"),
    ],
)
def test_by_hand(config: FilterConfig | None, rewards: tuple[float | None, ...], expected: str | None) -> None:
    assert verdict(summary(rewards), config) == expected


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(-3, 3), min_size=2, max_size=6).map(tuple))
def test_a_group_that_the_zero_std_filter_keeps_has_advantages(rewards: tuple[float | None, ...]) -> None:
    (advantages_G,) = advantages([rewards], "group")
    if verdict(summary(rewards), ZERO_STD) is None:
        assert any(advantages_G)
    elif len(known := [reward for reward in rewards if reward is not None]) > 1:
        assert max(known) - min(known) <= 1e-7
