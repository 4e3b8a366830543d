"""From rewards and a critic's values to the policy's loss: PPO with GAE as the papers have it, in plain loops.

The other methods are in test_parity.py; this one needs a critic's values besides. TRL's PPO is in test_gae.py.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.gae import gae, token_rewards, whitened
from algorithms.losses import Normalizer, grpo_loss
from algorithms.signal import penalised_rewards
from tests.algorithms.methods.batch import LENGTHS, MAX_COMPLETION_LENGTH, TEMPERATURE, Drifted, drifted
from tests.algorithms.methods.papers import Policies
from tests.algorithms.methods.test_parity import DRIFTS, config_of, stated

KL = {"kl_penalty": "reward", "beta": 0.05}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def values_of(seed: int) -> list[list[float]]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(length).tolist() for length in LENGTHS]


def paper(batch: Drifted, values: Sequence[Sequence[float]], config: GrpoConfig) -> tuple[float, Tensor]:
    """min(r A, clip(r) A) over the tokens, r against the policy that sampled, A whitened."""
    logits_BCV = batch.logits_BCV.clone().requires_grad_()
    policies = Policies(batch, logits_BCV)
    advantages: list[list[float]] = []
    for i, length in enumerate(LENGTHS):
        rewards = [-config.beta * (batch.sampled[i][t] - batch.reference[i][t]) for t in range(length)]
        rewards[-1] += policies.rewards[i]
        following = [*values[i][1:], 0.0]
        to_go, reverse = 0.0, []
        for t in reversed(range(length)):
            to_go = rewards[t] + config.gamma * following[t] - values[i][t] + config.gamma * config.lam * to_go
            reverse.append(to_go)
        advantages.append(reverse[::-1])
    every = [a for of_rollout in advantages for a in of_rollout]
    mean = sum(every) / len(every)
    std = math.sqrt(sum((a - mean) ** 2 for a in every) / (len(every) - 1) + 1e-8)
    terms = []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            r, a = torch.exp(policies.pi[i][t] - batch.sampled[i][t]), (advantages[i][t] - mean) / std
            terms.append(-torch.minimum(r * a, r.clamp(1 - config.epsilon, 1 + config.epsilon) * a))
    loss = torch.stack(terms).sum() / len(terms)
    (gradient_BCV,) = torch.autograd.grad(loss, logits_BCV)
    return loss.item(), gradient_BCV


def ours(batch: Drifted, values: Sequence[Sequence[float]], config: GrpoConfig) -> tuple[float, Tensor]:
    """What critic ranks, controller and policy ranks do, one after the other."""
    logits_BCV = batch.logits_BCV.clone().requires_grad_()
    sequence_N = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    column_N = torch.cat([torch.arange(length) for length in LENGTHS])

    def flat(rows: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([number for row in rows for number in row])

    rewards_S = torch.tensor(
        [reward for group in penalised_rewards(batch.groups, config, MAX_COMPLETION_LENGTH) for reward in group]
    )
    kl_N = flat(batch.sampled) - flat(batch.reference) if config.kl_penalty == "reward" else None
    rewards_N = token_rewards(rewards_S, kl_N, sequence_N, config.beta)
    advantages_N = gae(rewards_N, flat(values), sequence_N, config.gamma, config.lam)
    parts = [part.numpy().astype(np.float32) for part in advantages_N.split(list(LENGTHS))]
    white_N = torch.from_numpy(np.concatenate(whitened(parts, [np.ones(len(part), bool) for part in parts]))).double()
    table_NV = (logits_BCV[sequence_N, column_N] / TEMPERATURE).log_softmax(-1)
    targets_N = torch.tensor([token for row in batch.completions for token in row])
    loss, _ = grpo_loss(
        table_NV.gather(-1, targets_N[:, None])[:, 0],
        torch.zeros(len(sequence_N)),
        flat(batch.sampled),
        flat(batch.reference),
        white_N,
        sequence_N,
        num_sequences=len(LENGTHS),
        config=config,
        normalizer=Normalizer(len(LENGTHS), sum(LENGTHS), MAX_COMPLETION_LENGTH, 1),
        start_logprobs_N=flat(batch.start),
    )
    (gradient_BCV,) = torch.autograd.grad(loss, logits_BCV)
    return loss.item(), gradient_BCV


@pytest.mark.parametrize("keys", [{}, KL, {"gamma": 0.97, "lam": 0.8} | KL])
@pytest.mark.parametrize("seed", range(len(DRIFTS)))
def test_the_paper_says_so_too(seed: int, keys: dict[str, float]) -> None:
    """Advantages travel in float32, which is all that the difference is."""
    config = config_of("ppo").model_copy(update=keys)
    batch, values = drifted(seed, drift=DRIFTS[seed]), values_of(seed)
    loss, gradient_BCV = paper(batch, values, config)
    our_loss, our_BCV = ours(batch, values, config)
    assert gradient_BCV.abs().max() > 1e-3
    assert abs(our_loss - loss) <= stated("ppo", "paper")
    assert (our_BCV - gradient_BCV).abs().max() <= stated("ppo", "paper")


def test_a_rollout_that_does_not_end_may_cost_something() -> None:
    (first, second) = drifted(0).groups
    config = config_of("ppo").model_copy(update={"missing_eos_penalty": 1.5})
    before = penalised_rewards([first, second], config_of("ppo"), MAX_COMPLETION_LENGTH)
    assert penalised_rewards([first, second], config, MAX_COMPLETION_LENGTH) == before, "all of them have ended"
    cut = type(first)(**{name: getattr(first, name) for name in first.__slots__} | {"truncated_G": (True,) * 4})
    expected = [[reward - 1.5 for reward in before[0] if reward is not None], before[1]]
    assert penalised_rewards([cut, second], config, MAX_COMPLETION_LENGTH) == expected
