"""Each rule finds what it is for, once per episode, and nothing in a healthy run however noisy it is."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from algorithms.health.config import HealthConfig, Rule
from algorithms.health.rules import Watch

HEALTHY = {
    "frac_reward_zero_std": 0.3,
    "sampling/ess": 0.9,
    "kl": 0.05,
    "entropy": 0.4,
    "completions/mean_length": 300.0,
    "reward": 0.5,
    "step_time": 10.0,
    "wait/policy/groups_s": 4.0,
    "wait/rollout/idle_s": 1.0,
}


def watch(kind: str, **settings: Any) -> Watch:
    rule: Rule = TypeAdapter(Rule).validate_python({"kind": kind, "window": 4, **settings})
    return Watch(rule)


def steps(metric: str, values: Iterable[float]) -> Iterator[dict[str, float]]:
    return ({**HEALTHY, metric: value} for value in values)


def fired(watch: Watch, series: Iterable[dict[str, float]]) -> list[int]:
    """At which steps the rule says something."""
    return [step for step, metrics in enumerate(series) if watch.after(metrics) is not None]


SICK = {
    "zero_std": ("zero_std", {}, "frac_reward_zero_std", 0.95, r"frac_reward_zero_std was 0.95 over the last 4 steps"),
    "off_policy": ("off_policy", {}, "sampling/ess", 0.01, r"sampling/ess was 0.01 over the last 4 steps, under 0.1"),
    "kl": ("kl", {}, "kl", 7.5, r"kl was 7.5 nats a token over the last 4 steps, above 5"),
    "entropy": ("entropy", {}, "entropy", 0.001, r"entropy was 0.001 nats a token over the last 4 steps, under 0.02"),
    "idle policy": ("idle", {"pool": "policy"}, "wait/policy/groups_s", 9.9, r"wait/policy was 99% of the time"),
    "idle rollout": ("idle", {"pool": "rollout"}, "wait/rollout/idle_s", 9.9, r"wait/rollout was 99% of the time"),
}


@pytest.mark.parametrize(("kind", "settings", "metric", "sick", "message"), SICK.values(), ids=SICK)
def test_a_rule_fires_on_a_whole_window_and_says_what_to_try(
    kind: str, settings: dict[str, Any], metric: str, sick: float, message: str
) -> None:
    found = watch(kind, **settings)
    said = [found.after(metrics) for metrics in steps(metric, [sick] * 4)]
    assert said[:3] == [None] * 3
    assert said[3] is not None
    assert said[3].startswith(message)
    assert "; " in said[3], "what to try comes after what is wrong"
    assert found.firing


@pytest.mark.parametrize(("kind", "settings", "metric", "sick", "message"), SICK.values(), ids=SICK)
def test_a_rule_fires_once_per_episode(
    kind: str, settings: dict[str, Any], metric: str, sick: float, message: str
) -> None:
    well = HEALTHY[metric]
    found = watch(kind, **settings)
    series = [sick] * 20 + [well] * 8 + [sick] * 20
    first, second = fired(found, steps(metric, series))
    assert first == 3
    assert 28 <= second < 36


@pytest.mark.parametrize(("kind", "settings", "metric", "sick", "message"), SICK.values(), ids=SICK)
def test_a_single_bad_step_is_suspicious_and_not_told(
    kind: str, settings: dict[str, Any], metric: str, sick: float, message: str
) -> None:
    found = watch(kind, **settings)
    found.rule = found.rule.model_copy(update={"window": 8})
    found.__post_init__()
    well = HEALTHY[metric]
    for metrics in steps(metric, [well] * 8):
        assert found.after(metrics) is None
    assert not found.suspicious
    assert found.after({**HEALTHY, metric: sick}) is None
    assert found.suspicious
    assert found.after(HEALTHY) is None
    assert not found.suspicious


def test_a_value_at_the_threshold_is_told_at_most_once_a_window() -> None:
    found = watch("entropy", min=0.4)
    told = fired(found, steps("entropy", [0.39, 0.41] * 50))
    assert told[0] == 3
    assert min(np.diff(told)) > found.rule.window


def test_a_run_that_goes_on_begins_with_an_empty_window() -> None:
    before = watch("entropy")
    assert fired(before, steps("entropy", [0.001] * 3)) == []
    assert fired(watch("entropy"), steps("entropy", [0.001] * 3)) == []
    assert fired(watch("entropy"), steps("entropy", [0.001] * 4)) == [3]


def test_lowering_the_learning_rate_is_told_again_when_a_window_later_nothing_is_better() -> None:
    found = watch("entropy", action="lower_learning_rate")
    assert fired(found, steps("entropy", [0.001] * 12 + [0.5] * 12)) == [3, 7, 11]
    assert not found.firing


def lengths(values: Iterable[float], rewards: Iterable[float]) -> Iterator[dict[str, float]]:
    for length, reward in zip(values, rewards, strict=True):
        yield {**HEALTHY, "completions/mean_length": length, "reward": reward}


def test_length_that_grows_while_the_reward_stands_still_is_told() -> None:
    found = watch("length", window=20)
    growing = [100 * 1.06**step for step in range(20)]
    assert fired(found, lengths(growing, [0.5] * 20)) == [19]


def test_length_that_grows_with_the_reward_is_fine() -> None:
    found = watch("length", window=20)
    growing = [100 * 1.06**step for step in range(40)]
    assert fired(found, lengths(growing, [0.5 + 0.01 * step for step in range(40)])) == []


def test_length_that_grows_a_little_is_fine() -> None:
    found = watch("length", window=20)
    assert fired(found, lengths([100 * 1.02**step for step in range(40)], [0.5] * 40)) == []


def test_the_length_rule_needs_two_steps_to_be_suspicious() -> None:
    found = watch("length", window=2)
    found.after(HEALTHY)
    assert not found.suspicious


def test_a_metric_that_was_not_measured_says_nothing() -> None:
    for kind, metric in (
        ("kl", "kl"),
        ("entropy", "entropy"),
        ("length", "reward"),
        ("zero_std", "frac_reward_zero_std"),
    ):
        found = watch(kind)
        without = {name: value for name, value in HEALTHY.items() if name != metric}
        assert fired(found, [without] * 20) == [], kind
        assert not found.suspicious


def test_a_sample_size_that_was_no_number_is_the_worst() -> None:
    without = {name: value for name, value in HEALTHY.items() if name != "sampling/ess"}
    assert fired(watch("off_policy"), [without] * 4) == [3]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(0.0, 1.0), gain=st.floats(0.0, 0.5))
def test_the_defaults_find_nothing_in_a_healthy_noisy_run(seed: int, noise: float, gain: float) -> None:
    """Rewards rise or stand still, lengths and waits come and go, entropy falls slowly, some steps are off policy."""
    random = np.random.default_rng(seed)
    watches = [Watch(rule) for rule in HealthConfig().rules]
    for step in range(300):
        progress = step / 300

        def noisy(value: float, spread: float) -> float:
            return float(value * np.exp(noise * spread * random.standard_normal()))

        metrics = {
            "frac_reward_zero_std": min(1.0, noisy(0.2 + 0.3 * progress, 0.5)),
            "sampling/ess": 0.02 if random.random() < 0.05 else min(1.0, noisy(0.7, 0.4)),
            "entropy": noisy(1.0 - 0.8 * progress, 0.5),
            "completions/mean_length": noisy(300 * (1 + 0.5 * progress), 0.15),
            "reward": 0.3 + gain * progress + 0.05 * noise * random.standard_normal(),
            "step_time": 10.0,
            "wait/policy/groups_s": min(10.0, noisy(6.0, 0.5)),
            "wait/policy/stale_s": 0.1,
            "wait/rollout/idle_s": min(10.0, noisy(3.0, 1.0)),
        }
        assert [found.after(metrics) for found in watches] == [None] * len(watches)


def test_the_defaults_only_warn() -> None:
    assert {rule.action for rule in HealthConfig().rules} == {"warn"}


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "entropi"},
        {"kind": "entropy", "action": "stop"},
        {"kind": "entropy", "max": 1.0},
        {"kind": "idle"},
        {"kind": "length", "window": 1},
        {"kind": "zero_std", "max_share": 1.0},
    ],
)
def test_a_rule_that_could_not_work_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HealthConfig.model_validate({"rules": [rule]})
