"""Advantages, returns and the critic's loss are those of the papers in plain loops, and those of TRL's PPO.

Legend: B = rollouts of the batch, C = longest completion, N = loss tokens, S = sequences.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.gae import gae, token_rewards, whitened
from algorithms.losses import Normalizer, grpo_loss, value_loss
from algorithms.stats import merge
from tests.algorithms.trl_ppo import CLIPRANGE, CLIPRANGE_VALUE, FILE, GAMMA, KL_COEF, LAM, LENGTHS, Case, case

TOLERANCE = 1e-9
OF_FLOAT32 = 1e-6
"""docs/algorithms.md states it."""
TRL = json.loads(FILE.read_text())


def sequences(lengths: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def schulman(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """The sum of equation 16 of arXiv 1506.02438, written out for one trajectory that ends."""
    num = len(rewards)
    ahead = [*values, 0.0]
    deltas = [rewards[t] + gamma * ahead[t + 1] - ahead[t] for t in range(num)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, num)) for t in range(num)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_those_of_the_paper(seed: int, gamma: float, lam: float) -> None:
    random = np.random.default_rng(seed)
    lengths = [int(length) for length in random.integers(1, 40, 9)]
    rewards, values = ([random.standard_normal(length) for length in lengths] for _ in range(2))
    ours_N = gae(
        torch.tensor(np.concatenate(rewards)), torch.tensor(np.concatenate(values)), sequences(lengths), gamma, lam
    )
    expected = [a for r, v in zip(rewards, values, strict=True) for a in schulman(list(r), list(v), gamma, lam)]
    assert (ours_N - torch.tensor(expected)).abs().max() < TOLERANCE


def test_with_lam_1_a_token_is_worth_the_reward_to_go_less_the_value() -> None:
    """And with neither discount nor KL that is the sequence's reward."""
    values_N = torch.tensor([0.5, -1.0, 2.0, 0.25, 3.0], dtype=torch.float64)
    sequence_N = sequences([3, 2])
    rewards_N = token_rewards(torch.tensor([1.5, -2.0], dtype=torch.float64), None, sequence_N, 0.0)
    assert rewards_N.tolist() == [0, 0, 1.5, 0, -2.0]
    advantages_N = gae(rewards_N, values_N, sequence_N, 1.0, 1.0)
    assert (advantages_N + values_N).tolist() == pytest.approx([1.5, 1.5, 1.5, -2.0, -2.0])


def test_no_sequence_sees_another() -> None:
    """What follows in the row is not what follows in the sequence."""
    values_N, rewards_N = torch.randn(7).double(), torch.randn(7).double()
    alone = [
        gae(rewards_N[s], values_N[s], sequences([s.stop - s.start]), 0.9, 0.8) for s in (slice(0, 4), slice(4, 7))
    ]
    together_N = gae(rewards_N, values_N, sequences([4, 3]), 0.9, 0.8)
    assert torch.allclose(together_N, torch.cat(alone), rtol=0, atol=1e-12)


def test_nothing_to_value_is_no_error() -> None:
    nothing_N, no_sequence_N = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert gae(nothing_N, nothing_N, no_sequence_N, 1.0, 0.95).tolist() == []
    assert whitened([], []) == []


def test_whitened_advantages_have_mean_0_and_variance_1_over_what_counts() -> None:
    random = np.random.default_rng(3)
    advantages = [random.standard_normal(n).astype(np.float32) * 3 + 2 for n in (5, 1, 8)]
    counted = [random.random(len(each)) < 0.7 for each in advantages]
    found = whitened(advantages, counted)
    known = np.concatenate([each[mask] for each, mask in zip(found, counted, strict=True)])
    assert known.mean() == pytest.approx(0, abs=1e-6)
    assert known.std(ddof=1) == pytest.approx(1, abs=1e-5)
    left_out = np.concatenate([each[~mask] for each, mask in zip(found, counted, strict=True)])
    assert len(left_out) > 0
    assert np.isfinite(left_out).all()


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [4.0]])
def test_equal_advantages_say_nothing(values: list[float]) -> None:
    (found,) = whitened([np.array(values, np.float32)], [np.ones(len(values), bool)])
    assert found.tolist() == [0.0] * len(values)


def test_an_advantage_that_is_not_finite_stays_visible() -> None:
    (found,) = whitened([np.array([1.0, np.nan, 2.0], np.float32)], [np.ones(3, bool)])
    assert np.isnan(found).all()


def plain_value_loss(
    new: Sequence[float], old: Sequence[float], returns: Sequence[float], cliprange: float
) -> tuple[float, list[float]]:
    """Token by token, with the gradient written out by hand."""
    total, gradient = 0.0, []
    for value, before, target in zip(new, old, returns, strict=True):
        near = min(max(value, before - cliprange), before + cliprange)
        free, held = (value - target) ** 2, (near - target) ** 2
        total += max(free, held) / 2
        gradient.append((value - target) / len(new) if free > held or near == value else 0.0)
    return total / len(new), gradient


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cliprange", [0.05, 0.2, 10.0])
def test_the_value_loss_and_its_gradient_are_the_formula_s_however_the_batch_is_cut(
    seed: int, cliprange: float
) -> None:
    random = np.random.default_rng(seed)
    new, old, returns = (random.standard_normal(40) for _ in range(3))
    expected, expected_gradient = plain_value_loss(list(new), list(old), list(returns), cliprange)
    new_N = torch.tensor(new, requires_grad=True)
    shares, stats = [], []
    for part in (slice(0, 7), slice(7, 30), slice(30, 30), slice(30, 40)):
        old_N, returns_N = torch.tensor(old[part]), torch.tensor(returns[part])
        loss, measured = value_loss(new_N[part], old_N, returns_N, cliprange_value=cliprange, num_loss_tokens=40)
        shares.append(loss)
        stats.append(measured)
    total = torch.stack(shares).sum()
    (gradient_N,) = torch.autograd.grad(total, new_N)
    assert total.item() == pytest.approx(expected, abs=TOLERANCE)
    assert gradient_N.tolist() == pytest.approx(expected_gradient, abs=TOLERANCE)
    metrics = merge(stats).finish()
    assert metrics["value/explained_variance"] == pytest.approx(1 - np.var(returns - old) / np.var(returns))
    assert metrics["value/mean"] == pytest.approx(old.mean())


def test_a_stale_token_leaves_the_value_loss_and_stays_in_what_divides() -> None:
    new_N = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    fresh_N = torch.tensor([True, False, True])
    loss, stats = value_loss(
        new_N, torch.zeros(3), torch.zeros(3), cliprange_value=10.0, num_loss_tokens=3, fresh_N=fresh_N
    )
    assert loss.item() == pytest.approx((1 + 9) / 2 / 3)
    (gradient_N,) = torch.autograd.grad(loss, new_N)
    assert gradient_N.tolist() == pytest.approx([1 / 3, 0, 1])
    assert stats.num_value_tokens == 2


def test_returns_that_do_not_vary_have_no_explained_variance() -> None:
    _, stats = value_loss(torch.ones(4), torch.ones(4), torch.ones(4), cliprange_value=0.2, num_loss_tokens=4)
    assert "value/explained_variance" not in stats.finish()
    assert stats.finish()["value/clip_fraction"] == 0


# TRL -----------------------------------------------------------------------------------------------------------------


def flat(values_BC: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(values_BC, lengths, strict=True)])


def trl(number: int, name: str, lengths: Sequence[int]) -> Tensor:
    return flat(torch.tensor(TRL[number][name], dtype=torch.float64).view(4, -1), lengths)


def our_advantages(batch: Case) -> tuple[Tensor, Tensor]:
    """Flat over the steps that TRL counts: where there is room it has one behind the last token, without a KL."""
    sequence_N = sequences(batch.steps)
    place_N = torch.cat([torch.arange(steps) for steps in batch.steps])
    real_N = place_N < torch.tensor(batch.lengths)[sequence_N]
    kl_N = (flat(batch.logprobs_BC, batch.steps) - flat(batch.reference_BC, batch.steps)).where(real_N, 0.0)
    rewards_N = token_rewards(batch.scores_B, kl_N, sequence_N, KL_COEF)
    values_N = flat(batch.values_BC, batch.steps)
    advantages_N = gae(rewards_N, values_N, sequence_N, GAMMA, LAM)
    return advantages_N, advantages_N + values_N


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_trl_has_the_same_returns_and_whitened_advantages(number: int) -> None:
    batch = case(number)
    advantages_N, returns_N = our_advantages(batch)
    assert (returns_N - trl(number, "returns", batch.steps)).abs().max() < TOLERANCE
    of_steps = [each.numpy() for each in advantages_N.split(batch.steps)]
    counted = [np.arange(steps) < length for steps, length in zip(batch.steps, batch.lengths, strict=True)]
    ours = [each[mask] for each, mask in zip(whitened(of_steps, counted), counted, strict=True)]
    ours_N = torch.tensor(np.concatenate(ours))
    assert (ours_N - trl(number, "advantages", batch.lengths)).abs().max() < OF_FLOAT32


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_trl_has_the_same_value_loss_and_gradient(number: int) -> None:
    batch = case(number)
    _, returns_N = our_advantages(batch)
    new_N = flat(batch.new_values_BC, batch.steps).requires_grad_()
    old_N = flat(batch.values_BC, batch.steps)
    loss, stats = value_loss(new_N, old_N, returns_N, cliprange_value=CLIPRANGE_VALUE, num_loss_tokens=sum(batch.steps))
    (gradient_N,) = torch.autograd.grad(loss, new_N)
    assert loss.item() == pytest.approx(TRL[number]["value_loss"][0], abs=TOLERANCE)
    assert (gradient_N - trl(number, "value_gradient", batch.steps)).abs().max() < TOLERANCE
    assert gradient_N.abs().max() > 1e-3
    clipped = stats.finish()["value/clip_fraction"]
    assert 0 < clipped < 1
    assert clipped == pytest.approx(TRL[number]["clip_fraction"][0], abs=1e-6)


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_trl_has_the_same_policy_loss_and_gradient(number: int) -> None:
    """The clipped ratio against the policy that sampled, with an advantage for each token."""
    batch = case(number)
    config = GrpoConfig(epsilon=CLIPRANGE, old_logprobs="sampled", vllm_importance_sampling_correction=False)
    num_tokens = sum(batch.lengths)
    new_N = flat(batch.new_logprobs_BC, batch.lengths).requires_grad_()
    loss, stats = grpo_loss(
        new_N,
        torch.zeros(num_tokens),
        flat(batch.logprobs_BC, batch.lengths),
        None,
        trl(number, "advantages", batch.lengths),
        sequences(batch.lengths),
        num_sequences=4,
        config=config,
        normalizer=Normalizer(4, num_tokens, 6, 1),
    )
    (gradient_N,) = torch.autograd.grad(loss, new_N)
    assert loss.item() == pytest.approx(TRL[number]["policy_loss"][0], abs=TOLERANCE)
    assert (gradient_N - trl(number, "policy_gradient", batch.lengths)).abs().max() < TOLERANCE
    assert stats.finish()["clip_ratio/region_mean"] > 0
