"""The metrics of a batch by hand, and never a NaN."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.metrics import reward_metrics
from algorithms.types import GroupSummary


def summary(rewards: tuple[float | None, ...] = (1.0, 0.0), **changes: Any) -> GroupSummary:
    size = len(rewards)
    fields: dict[str, Any] = {
        "ordinal": 0,
        "epoch": 0,
        "attempt": 0,
        "replica": 0,
        "num_tokens_G": (12,) * size,
        "num_loss_tokens_G": (8,) * size,
        "num_prompt_tokens": 4,
        "truncated_G": (False,) * size,
        "tokens_by_version_G": ({0: 8},) * size,
        "rewards_G": rewards,
        "scores": {"accuracy": rewards},
        "failures": {},
        "generate_s": 1.0,
        "score_s": 0.1,
    }
    return GroupSummary(**(fields | changes))


def staleness(groups: list[GroupSummary], **options: int) -> dict[str, float]:
    metrics = reward_metrics(groups, version=7, **options)
    return {name: value for name, value in metrics.items() if name.startswith("staleness/")}


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_mean_of_huge_rewards_is_left_out_where_it_overflows() -> None:
    """The checkpoint keeps it as JSON, in which an infinity cannot be read back."""
    metrics = reward_metrics([summary((1e308, 1e308)), summary((-1e308, 1e308))], version=0)
    assert all(map(math.isfinite, metrics.values()))
    assert "reward" not in reward_metrics([summary((1e308, 1e308))], version=0)


def test_by_hand() -> None:
    groups = [
        summary((1.0, None), num_loss_tokens_G=(2, 6), truncated_G=(False, True), failures={"timeout": 1}),
        summary((3.0, 5.0), num_loss_tokens_G=(4, 8), scores={"style": (3.0, 5.0)}, failures={"timeout": 2, "died": 1}),
    ]
    assert reward_metrics(groups, version=0) == pytest.approx(
        {
            "reward": 3.0,
            "reward_std": 2.0,
            "frac_reward_zero_std": 0.0,
            "reward/unscorable": 1.0,
            "reward/failures/timeout": 3.0,
            "reward/failures/died": 1.0,
            "rewards/accuracy/mean": 1.0,
            "rewards/style/mean": 4.0,
            "rewards/style/std": math.sqrt(2.0),
            "completions/mean_length": 5.0,
            "completions/min_length": 2.0,
            "completions/max_length": 8.0,
            "completions/mean_terminated_length": 14 / 3,
            "completions/min_terminated_length": 2.0,
            "completions/max_terminated_length": 8.0,
            "completions/clipped_ratio": 0.25,
            "staleness/mean": 0.0,
            "staleness/max": 0.0,
            "staleness/masked": 0.0,
            "staleness/share/0": 1.0,
        }
    )


def test_staleness_is_weighted_by_tokens() -> None:
    groups = [summary(tokens_by_version_G=({7: 30}, {5: 10})), summary(tokens_by_version_G=({6: 15}, {6: 25}))]
    assert staleness(groups) == pytest.approx(
        {
            "staleness/mean": (10 * 2 + 40) / 80,
            "staleness/max": 2.0,
            "staleness/masked": 0.0,
            "staleness/share/0": 30 / 80,
            "staleness/share/1": 40 / 80,
            "staleness/share/2": 10 / 80,
        }
    )


def test_masked_tokens_have_no_staleness() -> None:
    """Nobody trains on them; how many they are is told."""
    groups = [summary(tokens_by_version_G=({7: 30}, {4: 10, 7: 20})), summary(tokens_by_version_G=({5: 40}, {3: 20}))]
    assert staleness(groups, max_staleness=2) == pytest.approx(
        {
            "staleness/mean": 40 * 2 / 90,
            "staleness/max": 2.0,
            "staleness/masked": 30 / 120,
            "staleness/share/0": 50 / 90,
            "staleness/share/2": 40 / 90,
        }
    )
    assert staleness(groups, max_staleness=9) == staleness(groups)
    assert staleness([summary(tokens_by_version_G=({1: 8}, {2: 8}))], max_staleness=2) == {"staleness/masked": 1.0}


@pytest.mark.parametrize(
    ("rewards", "scale", "expected"),
    [
        ([(0.3,) * 3, (0.0, 1.0, 2.0)], "group", 0.5),
        ([(0.3,) * 3, (0.0, 1.0, 2.0)], "none", 0.5),
        ([(0.3,) * 3, (0.0, 1.0, 2.0)], "batch", 0.0),
        ([(0.3,) * 3, (0.3,) * 3], "batch", 1.0),
        ([(0.3, None), (None, None)], "group", 0.0),
    ],
)
def test_fraction_without_spread(rewards: list, scale: Any, expected: float) -> None:
    metrics = reward_metrics([summary(group) for group in rewards], version=0, scale_rewards=scale)
    assert metrics["frac_reward_zero_std"] == expected


def test_what_has_no_value_is_left_out() -> None:
    metrics = reward_metrics([summary((None, None), truncated_G=(True, True))], version=0)
    assert metrics["reward/unscorable"] == 2.0
    assert metrics["completions/clipped_ratio"] == 1.0
    assert not [name for name in metrics if name in ("reward", "reward_std") or name.startswith("rewards/")]
    assert not [name for name in metrics if "terminated" in name]


@settings(deadline=None)
@given(st.lists(st.lists(st.none() | st.floats(-10, 10), min_size=1, max_size=4).map(tuple), max_size=4))
def test_never_a_nan(rewards: list) -> None:
    metrics = reward_metrics([summary(group) for group in rewards], version=2)
    assert all(math.isfinite(value) for value in metrics.values())
