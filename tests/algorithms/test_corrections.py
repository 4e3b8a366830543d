"""Importance weights by hand, and within their bounds for any ratio."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.corrections import Mode, importance_weights, log_ratio, sequence_sum

# Two sequences, of ratios 2, 4 (product 8) and 1/2, 1 (product 1/2).
RATIOS_N = torch.tensor([2.0, 4.0, 0.5, 1.0])
SEQUENCE_N = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("mode", "clip_min", "clip_max", "expected"),
    [
        ("token_truncate", None, 3.0, [2.0, 3.0, 0.5, 1.0]),
        ("token_truncate", 0.8, 3.0, [2.0, 3.0, 0.8, 1.0]),
        ("token_mask", None, 3.0, [2.0, 0.0, 0.5, 1.0]),
        ("token_mask", 0.8, 3.0, [2.0, 0.0, 0.0, 1.0]),
        ("sequence_truncate", None, 3.0, [3.0, 3.0, 0.5, 0.5]),
        ("sequence_truncate", 0.8, 3.0, [3.0, 3.0, 0.8, 0.8]),
        ("sequence_mask", None, 3.0, [0.0, 0.0, 0.5, 0.5]),
        ("sequence_mask", 0.8, None, [8.0, 8.0, 0.0, 0.0]),
        ("sequence_mask", None, None, [8.0, 8.0, 0.5, 0.5]),
        ("token_truncate", None, None, [2.0, 4.0, 0.5, 1.0]),
    ],
)
def test_by_hand(mode: Any, clip_min: float | None, clip_max: float | None, expected: list[float]) -> None:
    weights = importance_weights(
        RATIOS_N.log(), SEQUENCE_N, num_sequences=2, mode=mode, clip_min=clip_min, clip_max=clip_max
    )
    torch.testing.assert_close(weights.weights_N, torch.tensor(expected))
    assert len(weights.weights_U) == (2 if mode.startswith("sequence") else 4)


def test_an_unknown_sampled_logprob_has_weight_one_and_a_nan_of_the_policy_shows() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0, math.nan], requires_grad=True)
    result_N = log_ratio(logprobs_N, torch.tensor([math.nan, -2.5, -1.0]))
    assert not result_N.requires_grad
    assert result_N[0] == 0.0
    assert result_N[1] == 0.5
    assert result_N[2].isnan()


def test_a_sequence_without_tokens_has_weight_one() -> None:
    weights = importance_weights(
        RATIOS_N.log(), SEQUENCE_N * 2, num_sequences=3, mode="sequence_mask", clip_min=None, clip_max=9.0
    )
    torch.testing.assert_close(weights.weights_U, torch.tensor([8.0, 1.0, 0.5]))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-200, 200), st.integers(0, 3)), max_size=12),
    st.sampled_from(get_args(Mode)),
    st.floats(0.0, 1.0),
    st.floats(1.0, 10.0),
)
def test_weights_are_within_their_bounds(tokens: list, mode: Any, clip_min: float, clip_max: float) -> None:
    ratios_N = torch.tensor([ratio for ratio, _ in tokens], dtype=torch.float64)
    sequence_N = torch.tensor([sequence for _, sequence in tokens], dtype=torch.long)
    weights = importance_weights(ratios_N, sequence_N, num_sequences=4, mode=mode, clip_min=clip_min, clip_max=clip_max)
    inside_N = (weights.weights_N >= clip_min) & (weights.weights_N <= clip_max)
    assert (inside_N | (weights.weights_N == 0 if mode.endswith("mask") else False)).all()
    assert len(weights.weights_N) == len(tokens)


def test_sequence_sum_is_a_sum_by_sequence() -> None:
    sums_S = sequence_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 4)
    assert sums_S.tolist() == [2.0, 0.0, 5.0, 0.0]
