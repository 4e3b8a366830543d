"""From rewards to advantages by hand, and what normalising over tokens means, token by token."""

import statistics
from dataclasses import replace
from typing import Any

import pytest
from trl.rewards import get_soft_overlong_punishment

from algorithms.config import GrpoConfig
from algorithms.overlong import soft_overlong_punishment
from algorithms.signal import Signal, signal
from algorithms.types import GroupSummary, KlSums

LONGEST = 10


def summary(rewards: list[float | None], lengths: list[int], kl: list[list[float]] | None = None) -> GroupSummary:
    """`kl` has one estimate for each token."""
    return GroupSummary(
        ordinal=0,
        epoch=0,
        attempt=0,
        replica=0,
        num_tokens_G=tuple(2 + length for length in lengths),
        num_loss_tokens_G=tuple(lengths),
        num_prompt_tokens=2,
        truncated_G=(False,) * len(lengths),
        tokens_by_version_G=tuple({0: length} for length in lengths),
        rewards_G=tuple(rewards),
        scores={},
        failures={},
        generate_s=0.0,
        score_s=0.0,
        kl_G=() if kl is None else tuple(map(sums, kl)),
    )


def to_go(kl: list[float]) -> list[float]:
    return [sum(kl[at:]) for at in range(len(kl))]


def sums(kl: list[float]) -> KlSums:
    return KlSums(sum(kl), sum(to_go(kl)), sum(value**2 for value in to_go(kl)))


def config(**keys: Any) -> GrpoConfig:
    return GrpoConfig(**{"scale_rewards": "none"} | keys)


def test_the_others_of_the_group_are_the_baseline() -> None:
    worth = signal([summary([1.0, 2.0, 6.0, None], [1] * 4)], config(baseline="leave_one_out"), LONGEST)
    assert worth.advantages == [pytest.approx((-3.0, -1.5, 4.5, 0.0))]
    assert worth.kl_weight == 0.0


def test_one_reward_has_no_others() -> None:
    worth = signal([summary([None, 2.0], [1, 1])], config(baseline="leave_one_out"), LONGEST)
    assert worth.advantages == [(0.0, 0.0)]


def test_without_a_baseline_the_reward_is_the_advantage() -> None:
    worth = signal([summary([3.0], [1]), summary([None], [1])], config(baseline="none", num_generations=1), LONGEST)
    assert worth.advantages == [(3.0,), (0.0,)]


@pytest.mark.parametrize("over", ["rollouts", "tokens"])
def test_normalised_advantages_have_mean_0_and_spread_1_over_what_they_are_normalised_over(over: str) -> None:
    lengths = [3, 1, 5, 2, 7, 4]
    groups = [summary([1.0, None, 4.0], lengths[:3]), summary([0.5, 2.5, -1.0], lengths[3:])]
    worth = signal(groups, config(normalize_advantages=over), LONGEST)
    flat = [advantage for group in worth.advantages for advantage in group]
    assert flat.pop(1) == 0.0, "who has no reward is not counted"
    lengths.pop(1)
    counts = lengths if over == "tokens" else [1] * 5
    values = [value for value, count in zip(flat, counts, strict=True) for _ in range(count)]
    assert statistics.fmean(values) == pytest.approx(0.0, abs=1e-12)
    assert statistics.stdev(values) == pytest.approx(1.0, abs=1e-3)


def test_tokens_that_the_loss_leaves_out_do_not_normalise_the_others() -> None:
    """As in a mean over tokens; over rollouts all of them count, as in TRL."""
    cut = replace(summary([1.0, 0.0, 0.0, 0.0], [2, 3, 50, 50]), truncated_G=(False, False, True, True))
    keys = {"mask_truncated_completions": True, "baseline": "none"}
    ((first, second, *_),) = signal([cut], config(normalize_advantages="tokens", **keys), 50).advantages
    assert first is not None
    assert second is not None
    trained = [first] * 2 + [second] * 3
    assert statistics.fmean(trained) == pytest.approx(0.0, abs=1e-9)
    assert statistics.stdev(trained) == pytest.approx(1.0, abs=1e-3)
    (of_rollouts,) = signal([cut], config(normalize_advantages="rollouts", **keys), 50).advantages
    assert sum(filter(None, of_rollouts)) == pytest.approx(0.0, abs=1e-9)


def test_the_kl_to_go_is_normalised_with_the_rewards() -> None:
    """Mean and spread come from three sums for each rollout, and are those of all the tokens' advantages."""
    beta, kl = 0.3, [[0.5, -0.2, 0.1], [1.0], [0.0, 0.4], [-0.3, 0.2, 0.2, 0.1]]
    rewards = [1000.0, 1002.0, 1001.0, 1005.0]
    groups = [summary(rewards[:2], [3, 1], kl[:2]), summary(rewards[2:], [2, 4], kl[2:])]
    keys = {"baseline": "none", "beta": beta, "kl_penalty": "reward_to_go", "normalize_advantages": "tokens"}
    worth = signal(groups, config(**keys), LONGEST)
    tokens = [[reward - beta * left for left in to_go(of)] for reward, of in zip(rewards, kl, strict=True)]
    every = [value for of_rollout in tokens for value in of_rollout]
    mean, std = statistics.fmean(every), statistics.stdev(every) + 1e-4
    flat = [advantage for group in worth.advantages for advantage in group]
    for advantage, of_kl, expected in zip(flat, kl, tokens, strict=True):
        ours = [advantage - worth.kl_weight * left for left in to_go(of_kl)]
        assert ours == pytest.approx([(value - mean) / std for value in expected], abs=1e-9)


def test_the_kl_in_the_reward_is_part_of_the_baseline() -> None:
    groups = [summary([1.0, 1.0], [2, 1], [[1.0, 1.0], [4.0]])]
    worth = signal(groups, config(beta=0.5, kl_penalty="reward", baseline="leave_one_out"), LONGEST)
    assert worth.advantages == [pytest.approx((1.0, -1.0))]
    assert worth.kl_weight == 0.0


def test_a_teachers_weight_is_beta_whatever_scales_the_rewards() -> None:
    groups = [summary([1.0, 3.0], [2, 1], [[1.0, 1.0], [4.0]])]
    for scale in ({"scale_rewards": "group"}, {"normalize_advantages": "rollouts"}, {}):
        worth = signal(groups, config(beta=0.5, kl_penalty="advantage", **scale), LONGEST)
        assert worth.kl_weight == 0.5
        assert worth.advantages[0][1] > 0


@pytest.mark.parametrize("over", ["rollouts", "tokens"])
def test_a_batch_without_spread_says_nothing(over: str) -> None:
    for rewards in ([2.0, 2.0], [None, None], [None, 2.0]):
        worth = signal([summary(rewards, [3, 4])], config(normalize_advantages=over), LONGEST)
        assert worth.advantages == [(0.0, 0.0)]
        assert worth.kl_weight == 0.0


def test_a_batch_without_spread_says_nothing_of_the_kl() -> None:
    """Divided by a spread of 0 a KL of the rollout without a reward would outweigh all rewards ten-thousandfold."""
    keys = {"kl_penalty": "reward_to_go", "beta": 0.01, "baseline": "none", "scale_rewards": "none"}
    for rewards in ([2.0, 2.0], [None, None], [None, 2.0]):
        worth = signal([summary(rewards, [3, 4])], config(normalize_advantages="tokens", **keys), LONGEST)
        assert worth == Signal([(0.0, 0.0)], 0.0)


@pytest.mark.parametrize("cache", [1, 4, 10])
def test_the_overlong_punishment_is_trls(cache: int) -> None:
    theirs = get_soft_overlong_punishment(LONGEST, cache)
    lengths = list(range(1, LONGEST + 1))
    ours = [soft_overlong_punishment(length, LONGEST, cache) for length in lengths]
    assert ours == pytest.approx(theirs(completion_ids=[[1] * length for length in lengths]))
    assert ours[-1] == -1.0


def test_the_punishment_moves_the_advantage_and_unscorable_rollouts_stay_so() -> None:
    groups = [summary([1.0, 1.0, None], [4, 10, 10])]
    worth = signal(groups, config(soft_punish_cache=4), LONGEST)
    assert worth.advantages == [pytest.approx((0.5, -0.5, 0.0))]
