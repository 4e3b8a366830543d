"""Which checkpoint is the best is decided by what all of them say, and chance has no part in it."""

import math

import pytest

from actors.checkpoint.best import Score, Watch, best_of
from actors.checkpoint.config import BestConfig

HIGH, LOW = BestConfig(metric="reward", mode="max"), BestConfig(metric="reward", mode="min")


@pytest.mark.parametrize(
    ("config", "scores", "best"),
    [
        (HIGH, {}, None),
        (HIGH, {5: None}, None),
        (HIGH, {5: Score("reward", 0.1, 5), 10: Score("reward", 0.2, 5), 15: None}, 10),
        (LOW, {5: Score("reward", 0.1, 5), 10: Score("reward", 0.2, 5)}, 5),
        (HIGH, {5: Score("reward", 0.2, 5), 10: Score("reward", 0.2, 5)}, 10),
        (HIGH, {5: Score("loss", 9.0, 5), 10: Score("reward", -1.0, 5)}, 10),
        (HIGH, {5: Score("reward", 0.1, 5), 6: Score("reward", 0.9, 1), 10: Score("reward", 0.2, 4)}, 10),
        (HIGH, {1: Score("reward", 0.9, 1)}, 1),
    ],
    ids=["none", "no value", "highest", "lowest", "the newest", "another metric", "too few steps", "alone"],
)
def test_the_best(config: BestConfig, scores: dict[int, Score | None], best: int | None) -> None:
    assert best_of(scores, config) == best


def test_the_mean_is_over_the_steps_since_the_last_cut() -> None:
    watch = Watch("reward")
    assert watch.take() is None
    for value in (1.0, math.nan, 2.0):
        assert watch.saw({"reward": value}) is None
    assert watch.saw({"loss": 1.0}) is None, "a step may have no reward when others have"
    assert watch.take() == Score("reward", 1.5, 2)
    assert watch.take() is None
    for _ in range(2):
        watch.saw({"reward": 1e308})
    assert watch.take() is None, "JSON has no infinity, and a cut that holds one could not be read"
