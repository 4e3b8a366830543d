"""Lengths have the distribution that was asked for, and the first attempts do not depend on the schedule."""

from statistics import fmean, median

import numpy as np
import pytest

from algorithms.simulation.config import GeometricLengths, LengthsConfig, LognormalLengths, TraceLengths
from algorithms.simulation.lengths import Lengths

G = 4


def draw(config: LengthsConfig, count: int = 5000, max_length: int = 10_000, seed: int = 0) -> list[list[int]]:
    lengths = Lengths(config, G, max_length, seed)
    return [lengths.draw(ordinal, 0) for ordinal in range(count)]


def flat(groups: list[list[int]]) -> list[int]:
    return [length for group in groups for length in group]


def test_lognormal_has_its_median_and_is_cut() -> None:
    lengths = flat(draw(LognormalLengths(kind="lognormal", median=100, sigma=1.0, max=900)))
    assert median(lengths) == pytest.approx(100, rel=0.05)
    assert (max(lengths), min(lengths) >= 1) == (900, True)


def test_geometric_has_its_mean() -> None:
    lengths = flat(draw(GeometricLengths(kind="geometric", mean=50)))
    assert fmean(lengths) == pytest.approx(50, rel=0.03)
    assert np.mean(np.array(lengths) == 1) == pytest.approx(1 / 50, rel=0.25)


def test_no_spread_makes_all_lengths_equal() -> None:
    assert set(flat(draw(LognormalLengths(kind="lognormal", median=7, sigma=0.0), 10))) == {7}


@pytest.mark.parametrize("kind", ["lognormal", "geometric"])
def test_the_rollouts_of_a_prompt_are_as_alike_as_asked(kind: str) -> None:
    shape = {"median": 200} if kind == "lognormal" else {"mean": 200}
    for correlation in (0.0, 0.6, 1.0):
        config = {"lognormal": LognormalLengths, "geometric": GeometricLengths}[kind](
            kind=kind, group_correlation=correlation, **shape
        )
        logs = np.log(np.array(draw(config)))
        measured = np.corrcoef(logs[:, 0], logs[:, 1])[0, 1]
        assert measured == pytest.approx(correlation, abs=0.08)


def test_attempts_differ_and_keep_what_is_the_prompts() -> None:
    lengths = Lengths(LognormalLengths(kind="lognormal", median=500, group_correlation=0.9), G, 10_000, 0)
    first = [lengths.draw(ordinal, 0) for ordinal in range(200)]
    again = [lengths.draw(ordinal, 1) for ordinal in range(200)]
    assert first != again
    assert again == [lengths.draw(ordinal, 1) for ordinal in range(200)]
    assert np.corrcoef([fmean(g) for g in first], [fmean(g) for g in again])[0, 1] > 0.7


def test_a_trace_gives_whole_groups_and_draws_other_sizes_from_them() -> None:
    config = TraceLengths(kind="trace", path="run")
    trace = [(1, 2, 3, 4), (10, 20, 30, 40)]
    lengths = Lengths(config, 4, 35, 0, trace)
    groups = {tuple(lengths.draw(ordinal, 0)) for ordinal in range(50)}
    assert groups == {(1, 2, 3, 4), (10, 20, 30, 35)}
    assert set(lengths.draw(0, 1)) <= {1, 2, 3, 4} or set(lengths.draw(0, 1)) <= {10, 20, 30, 35}
    assert len(Lengths(config, 6, 35, 0, trace).draw(0, 0)) == 6


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match=r"simulation\.lengths\.path: run holds no groups"):
        Lengths(TraceLengths(kind="trace", path="run"), 4, 35, 0, [])
