"""The depth settles where the samples are on policy enough, and is never out of range whatever is measured."""

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from algorithms.config import AdaptDepthConfig
from algorithms.depth import DepthController

PROMPT = AdaptDepthConfig(smoothing=0.0)
"""Every measurement counts alone."""
GROUPS_PER_BATCH = 8
measurements = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.integers(1, 40),
    st.integers(0, 200),
    st.integers(0, 400),
    st.floats(0.0, 0.95),
    st.none() | st.floats(0.01, 1.0),
    st.lists(st.tuples(measurements, measurements), max_size=60),
)
def test_never_out_of_range(
    lowest: int, room: int, depth: int, smoothing: float, kl_max: float | None, measured: list
) -> None:
    controller = DepthController(AdaptDepthConfig(smoothing=smoothing, kl_max=kl_max), lowest, lowest + room, depth)
    assert lowest <= controller.depth <= lowest + room
    for ess, kl in measured:
        assert controller.update(ess, kl) == controller.depth
        assert lowest <= controller.depth <= lowest + room


@pytest.mark.parametrize(
    ("ess", "kl", "expected"),
    [
        (0.4, None, 32),  # under the band: x 0.8
        (0.6, None, 40),  # inside
        (0.9, None, 42),  # over: + lowest // 4
        (0.9, 0.05, 42),
        (0.9, 0.2, 32),  # the KL divergence has the last word
        (None, 0.2, 32),
        (None, 0.05, 40),
        (None, None, 40),
        (math.nan, None, 32),
        (0.9, math.nan, 32),
    ],
)
def test_one_measurement(ess: float | None, kl: float | None, expected: int) -> None:
    config = AdaptDepthConfig(smoothing=0.0, kl_max=0.1)
    assert DepthController(config, 8, 64, 40).update(ess, kl) == expected


def test_shrinking_is_by_one_at_least_and_growing_too() -> None:
    controller = DepthController(PROMPT, 1, 9, 3)
    assert [controller.update(0.1, None) for _ in range(4)] == [2, 1, 1, 1]
    assert [controller.update(0.9, None) for _ in range(3)] == [2, 3, 4]


def test_without_kl_max_the_kl_is_not_looked_at() -> None:
    assert DepthController(PROMPT, 8, 64, 40).update(0.6, 1e9) == 40


def test_no_two_changes_on_the_same_evidence() -> None:
    """One very bad step lowers the mean for long; it is acted upon once, and only with another step beside it."""
    controller = DepthController(AdaptDepthConfig(smoothing=0.7), 8, 64, 40)
    assert [controller.update(ess, None) for ess in (0.05, 0.6, 0.6, 0.6, 0.6)] == [40, 32, 32, 32, 32]


def test_a_single_outlier_is_smoothed() -> None:
    controller = DepthController(AdaptDepthConfig(smoothing=0.7), 8, 64, 40)
    assert {controller.update(ess, None) for ess in (0.7, 0.7, 0.7, 0.4, 0.7, 0.95, 0.7)} == {40}


@pytest.mark.parametrize("smoothing", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("start", [8, 30, 64])
def test_it_settles_inside_the_band(start: int, smoothing: float) -> None:
    """Samples decay with the depth at which they were dispatched, and are measured once the pipeline has drained."""
    config = AdaptDepthConfig(smoothing=smoothing)
    controller = DepthController(config, 8, 64, start)
    pipeline: deque[int] = deque()
    measured, depths = [], []
    for _ in range(300):
        pipeline.append(controller.depth)
        if len(pipeline) * GROUPS_PER_BATCH >= controller.depth:
            dispatched_at = pipeline.popleft()
            measured.append(math.exp(-dispatched_at / 60))
            controller.update(measured[-1], None)
        depths.append(controller.depth)
    assert len(set(depths[-100:])) == 1, "it stands still"
    assert all(config.ess_low <= ess <= config.ess_high for ess in measured[-100:])
    assert 8 < depths[-1] < 64


def test_a_controller_goes_on_from_its_state() -> None:
    """In the middle of a body of evidence, and nothing that happens later changes the state."""
    random, config = np.random.default_rng(0), AdaptDepthConfig(smoothing=0.9, kl_max=0.5)
    measured = [(float(ess), float(kl)) for ess, kl in random.uniform(0.0, 1.0, (200, 2))]
    whole, first, second = (DepthController(config, 4, 40, 20) for _ in range(3))
    depths = [whole.update(*values) for values in measured]
    assert len(set(depths)) > 3
    for values in measured[:101]:
        first.update(*values)
    state = first.state()
    first.update(*measured[0])
    second.restore(state)
    assert [second.update(*values) for values in measured[101:]] == depths[101:]
