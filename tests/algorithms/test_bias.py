"""Dropping long samples is told, dropping at random is not, and the audit's memory does not grow with the run.

Legend: G = rollouts of one group.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from algorithms.bias import SelectionAudit, Tally

Left = Callable[[np.ndarray, np.random.Generator], bool]


def groups(random: np.random.Generator, num: int, size: int = 8, correlation: float = 0.5) -> list[np.ndarray]:
    """Log-normal lengths; rollouts of one prompt resemble each other."""
    between, within = np.sqrt(correlation), np.sqrt(1 - correlation)
    return [
        np.exp(5 + 0.8 * (between * random.standard_normal() + within * random.standard_normal(size))).astype(int)
        for _ in range(num)
    ]


def audited(left: Left, cause: str, num: int = 2000, seed: int = 0, correlation: float = 0.5) -> SelectionAudit:
    random, audit = np.random.default_rng(seed), SelectionAudit(seed=seed)
    for lengths_G in groups(random, num, correlation=correlation):
        rewards_G = (lengths_G > 150).astype(float).tolist()
        if left(lengths_G, random):
            audit.left_out(cause, lengths_G.tolist(), rewards_G)
        else:
            audit.trained(lengths_G.tolist(), rewards_G)
    return audit


def is_long(lengths_G: np.ndarray, random: np.random.Generator) -> bool:
    return bool(lengths_G.max() > 500)


def at_random(lengths_G: np.ndarray, random: np.random.Generator) -> bool:
    return bool(random.random() < 0.3)


@pytest.mark.parametrize(
    ("cause", "fix"),
    [("stale", "when_stale to 'pace'"), ("requeued", "when_stale to 'pace'"), ("surplus", "over_sampling")],
)
def test_dropping_long_samples_is_warned_of(cause: str, fix: str) -> None:
    audit = audited(is_long, cause)
    report, warning = audit.report(), audit.warning()
    assert warning is not None
    left, trained = report.lengths.left_out[cause], report.lengths.trained
    for expected in (f"'{cause}'", f"{left.mean:.0f} tokens", f"{trained.mean:.0f}", fix, "max_staleness"):
        assert expected in warning
    metrics = audit.metrics()
    assert metrics["bias/length_ks"] > 0.05
    assert metrics["bias/reward_ks"] > 0.0
    assert metrics["bias/length_mean/dispatched"] > metrics["bias/length_mean/trained"]


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("cause", ["stale", "requeued"])
def test_dropping_at_random_is_not_warned_of(cause: str, correlation: float) -> None:
    """Not even by chance, which lies in wait where few groups of similar rollouts look like many rollouts."""
    warned = [
        audited(at_random, cause, num, seed, correlation).warning() is not None
        for num, seed in itertools.product((30, 100), range(50))
    ]
    assert sum(warned) <= 3


def test_few_samples_are_no_evidence() -> None:
    audit = audited(is_long, "stale", num=2000)
    assert audit.warning() is not None
    few = SelectionAudit()
    for _ in range(100):
        few.trained([10] * 8, [0.0] * 8)
    for _ in range(6):
        few.left_out("stale", [5000] * 8, [0.0] * 8)
    assert few.warning() is None, "48 rollouts"


def test_a_small_share_does_not_move_the_distribution() -> None:
    audit = SelectionAudit()
    for lengths_G in groups(np.random.default_rng(0), 2000):
        audit.trained(lengths_G.tolist(), [])
    for _ in range(50):
        audit.left_out("stale", [5000] * 8, [])
    assert audit.warning() is None
    assert 0 < audit.metrics()["bias/length_ks"] < 0.05


def test_the_users_filters_are_reported_and_not_warned_of() -> None:
    audit = audited(is_long, "zero_std")
    assert audit.warning() is None
    assert audit.metrics()["bias/length_ks"] > 0.05


def test_what_a_filter_does_is_not_laid_on_the_scheduler() -> None:
    """Attempts are aborted at random before a filter leaves out the long ones among the others."""
    random, audit = np.random.default_rng(0), SelectionAudit()
    for lengths_G in groups(random, 3000):
        if random.random() < 0.6:
            audit.left_out("requeued", lengths_G.tolist(), [])
        elif is_long(lengths_G, random):
            audit.left_out("zero_std", lengths_G.tolist(), [])
        else:
            audit.trained(lengths_G.tolist(), [])
    assert audit.warning() is None


def test_lower_bounds_of_lengths_are_no_evidence_that_the_aborted_are_short() -> None:
    audit = SelectionAudit()
    for lengths_G in groups(np.random.default_rng(0), 500):
        audit.trained(lengths_G.tolist(), [])
        audit.left_out("requeued", (lengths_G // 3).tolist(), [])
    assert audit.metrics()["bias/length_ks"] > 0.05
    assert audit.warning() is None


def test_the_report_by_hand() -> None:
    audit = SelectionAudit()
    audit.trained([10, 20], [1.0, None])
    audit.left_out("surplus", [30, 40], [0.0, 0.0])
    audit.left_out("requeued", [60, 80], [])
    lengths, rewards = audit.report().lengths, audit.report().rewards
    assert (lengths.dispatched, lengths.trained) == (Tally(6, 40.0), Tally(2, 15.0))
    assert lengths.left_out == {"surplus": Tally(2, 35.0), "requeued": Tally(2, 70.0)}
    assert lengths.ks == pytest.approx(2 / 3)
    assert (rewards.dispatched, rewards.trained) == (Tally(3, pytest.approx(1 / 3)), Tally(1, 1.0))
    assert rewards.left_out == {"surplus": Tally(2, 0.0), "requeued": Tally(0, None)}
    assert rewards.ks == pytest.approx(2 / 3)
    assert audit.metrics() == {
        "bias/length_ks": lengths.ks,
        "bias/reward_ks": rewards.ks,
        "bias/length_mean/trained": 15.0,
        "bias/length_mean/dispatched": 40.0,
    }


def test_of_nothing_there_is_nothing_to_say() -> None:
    audit = SelectionAudit()
    assert audit.metrics() == {}
    assert audit.warning() is None
    audit.left_out("stale", [3] * 100, [None] * 100)
    assert audit.metrics() == {"bias/length_mean/dispatched": 3.0}
    assert audit.warning() is None


def test_without_anything_left_out_the_distance_is_zero() -> None:
    audit = audited(lambda lengths_G, random: False, "stale", num=50)
    assert audit.metrics()["bias/length_ks"] == 0.0


@pytest.mark.parametrize("reward", [1e155, 1e200, -1e308])
def test_a_reward_may_be_any_finite_number(reward: float) -> None:
    audit = SelectionAudit()
    for _ in range(300):
        audit.trained([3, 5], [reward, 1.0])
        audit.left_out("stale", [3, 5], [reward, reward])
    assert audit.metrics()["bias/length_ks"] == 0.0
    assert audit.warning() is None


def test_memory_is_bounded_and_the_counts_stay_exact() -> None:
    audit, random = SelectionAudit(capacity=256), np.random.default_rng(0)
    total = 0
    for lengths_G in groups(random, 3000):
        total += int(lengths_G.sum())
        audit.trained(lengths_G.tolist(), [0.5] * 8)
        audit.left_out("stale", (2 * lengths_G).tolist(), [0.5] * 8)
    for fates in (audit._lengths, audit._rewards):
        assert [len(fate.values) for fate in (fates.trained, *fates.left_out.values())] == [256, 256]
    report = audit.report()
    assert report.lengths.trained == Tally(24_000, total / 24_000)
    assert report.lengths.dispatched == Tally(48_000, 3 * total / 48_000)
    # Half of everything has twice the length: a shift of log 2 of a spread of 0.8 moves the distribution by 0.335.
    assert report.lengths.ks == pytest.approx(0.335 / 2, abs=0.05)
    assert audit.warning() is not None


def test_the_sample_is_of_the_whole_run() -> None:
    """Lengths that grow while the policy learns are all in it, the first as likely as the last."""
    audit = SelectionAudit(capacity=512)
    for step in range(4000):
        audit.trained([step] * 4, [])
    values = audit._lengths.trained.values
    assert np.mean(values) == pytest.approx(2000, abs=250)
    assert np.quantile(values, [0.1, 0.9]) == pytest.approx([400, 3600], abs=250)


def test_the_same_seed_gives_the_same_report() -> None:
    assert audited(is_long, "stale").report() == audited(is_long, "stale").report()


def test_an_audit_goes_on_from_its_state() -> None:
    """What is kept of the rest of the run is the same, the choice among too many values included."""

    def add(audit: SelectionAudit, numbers: range) -> None:
        for number in numbers:
            audit.trained([number, 2 * number], [0.1 * number, None])
            audit.left_out("stale", [3 * number], [1.0])

    whole, first, second = (SelectionAudit(capacity=20) for _ in range(3))
    add(whole, range(200))
    add(first, range(90))
    state = first.state()
    add(first, range(5))
    second.restore(state)
    add(second, range(90, 200))
    assert second.state() == whole.state()
    assert second.report() == whole.report()
    assert first.state() != state
