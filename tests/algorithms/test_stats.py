"""Statistics merge in any order and survive the way through a plain dict."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.stats import LossStats, merge

FIELDS = list(LossStats().to_dict())
statistics = st.lists(st.integers(0, 1000).map(float), min_size=len(FIELDS), max_size=len(FIELDS)).map(
    lambda values: LossStats(**dict(zip(FIELDS, values, strict=True)))
)


@settings(deadline=None)
@given(st.lists(statistics, max_size=5), st.randoms(use_true_random=False))
def test_merging_is_associative_commutative_and_has_a_neutral_element(parts: list, random: object) -> None:
    whole = merge(parts)
    shuffled = [*parts, LossStats()]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert merge(shuffled) == whole
    assert merge([merge(parts[:2]), merge(parts[2:])]) == whole


def test_each_field_merges_by_its_name() -> None:
    first, second = (LossStats(entropy=x, weight_min=x, weight_max=x, logp_difference_max=x) for x in (1.0, 2.0))
    merged = merge([first, second])
    assert (merged.entropy, merged.weight_min, merged.weight_max, merged.logp_difference_max) == (3.0, 1.0, 2.0, 2.0)


@settings(deadline=None)
@given(statistics)
def test_a_dict_of_plain_floats_gives_the_same_statistics_back(stats: LossStats) -> None:
    values = json.loads(json.dumps(stats.to_dict()))
    assert all(type(value) is float for value in values.values())
    assert LossStats.from_dict(values) == stats


def test_the_metrics_by_hand() -> None:
    stats = LossStats(
        num_tokens=4,
        entropy=6.0,
        kl=1.0,
        num_kl_tokens=4,
        low_clipped=1,
        high_clipped=2,
        num_ratio_tokens=4,
        low_clipped_min=0.0,
        high_clipped_max=0.5,
        logp_difference=0.6,
        logp_difference_max=0.4,
        sampling_kl=-0.3,
        num_sampled_tokens=3,
        token_weight=4.0,
        token_weight_squared=5.0,
        weight=3.0,
        num_weights=2,
        weight_min=1.0,
        weight_max=2.0,
    )
    assert stats.finish() == pytest.approx(
        {
            "entropy": 1.5,
            "kl": 0.25,
            "clip_ratio/low_mean": 0.25,
            "clip_ratio/high_mean": 0.5,
            "clip_ratio/region_mean": 0.75,
            "clip_ratio/low_min": 0.0,
            "clip_ratio/high_max": 0.5,
            "sampling/sampling_logp_difference/mean": 0.2,
            "sampling/sampling_logp_difference/max": 0.4,
            "sampling/importance_sampling_ratio/min": 1.0,
            "sampling/importance_sampling_ratio/mean": 1.5,
            "sampling/importance_sampling_ratio/max": 2.0,
            "sampling/ess": 0.8,
            "sampling/kl": -0.1,
        }
    )


def test_what_has_no_finite_value_is_left_out() -> None:
    assert LossStats().finish() == {}
    metrics = LossStats(num_tokens=2, entropy=math.nan, weight=math.inf, num_weights=2, weight_min=1.0).finish()
    assert metrics == {"sampling/importance_sampling_ratio/min": 1.0}
