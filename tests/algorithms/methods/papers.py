"""Every method from its paper in slow and obvious loops, from the rewards to the loss; nothing is shared with ours.

A policy's log-probabilities are lists of lists of scalars, pi[i][t] for token t of rollout i; of the policy that is
trained they are tensors with gradient. What the papers leave open (unbiased standard deviations, 1e-4 added to those
that divide) is as in TRL.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.algorithms.methods.batch import GROUP_SIZE, LENGTHS, MAX_COMPLETION_LENGTH, TEMPERATURE, Drifted

ROLLOUTS = range(len(LENGTHS))
NUM_TOKENS = sum(LENGTHS)


class Policies:
    """What a paper's formula names."""

    def __init__(self, batch: Drifted, logits_BCV: Tensor) -> None:
        self.behaviour, self.start, self.reference = batch.sampled, batch.start, batch.reference
        self.ages = batch.ages
        self.rewards: list[float] = [reward for reward in batch.rewards if reward is not None]
        self.pi: list[list[Tensor]] = []
        self.entropy: list[list[Tensor]] = []
        for i in ROLLOUTS:
            tables = [torch.log_softmax(logits_BCV[i, t] / TEMPERATURE, -1) for t in range(LENGTHS[i])]
            self.pi.append([tables[t][token] for t, token in enumerate(batch.completions[i])])
            self.entropy.append([-(table.exp() * table).sum() for table in tables])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def group_of(i: int) -> list[int]:
    first = i // GROUP_SIZE * GROUP_SIZE
    return list(range(first, first + GROUP_SIZE))


def group_advantages(rewards: Sequence[float], *, scaled: bool = True) -> list[float]:
    """(r - mean) / std over the group (GRPO), or r - mean (Dr. GRPO)."""
    advantages = []
    for i in ROLLOUTS:
        of_group = [rewards[j] for j in group_of(i)]
        advantages.append((rewards[i] - mean(of_group)) / (std(of_group) + 1e-4 if scaled else 1.0))
    return advantages


def ratio(pi: Tensor, old: float) -> Tensor:
    return torch.exp(pi - old)


def clip(value: Tensor, low: float, high: float) -> Tensor:
    return torch.clamp(value, low, high)


def ppo(r: Tensor, advantage: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A)."""
    return torch.minimum(r * advantage, clip(r, 1 - low, 1 + high) * advantage)


def over_tokens(term: Callable[[int, int], Tensor]) -> Tensor:
    """The mean over all tokens of the batch."""
    return sum((term(i, t) for i in ROLLOUTS for t in range(LENGTHS[i])), torch.zeros(())) / NUM_TOKENS


def over_rollouts(term: Callable[[int, int], Tensor]) -> Tensor:
    """The mean over the rollouts of the mean over each one's tokens."""
    means = [sum((term(i, t) for t in range(LENGTHS[i])), torch.zeros(())) / LENGTHS[i] for i in ROLLOUTS]
    return sum(means, torch.zeros(())) / len(LENGTHS)


def truncated_weight(p: Policies, i: int, t: int, highest: float = 3.0) -> float:
    """min(pi_start / pi_behaviour, C) of a token."""
    return min(math.exp(p.start[i][t] - p.behaviour[i][t]), highest)


def grpo(p: Policies) -> Tensor:
    advantages = group_advantages(p.rewards)
    return -over_rollouts(lambda i, t: ppo(ratio(p.pi[i][t], p.start[i][t]), advantages[i]) * truncated_weight(p, i, t))


def dr_grpo(p: Policies) -> Tensor:
    """The sum over the tokens of each rollout by a constant, whatever its length."""
    advantages = group_advantages(p.rewards, scaled=False)
    total = torch.zeros(())
    for i in ROLLOUTS:
        for t in range(LENGTHS[i]):
            r = ratio(p.pi[i][t], p.start[i][t])
            total = total + ppo(r, advantages[i]) * truncated_weight(p, i, t) / MAX_COMPLETION_LENGTH
    return -total / len(LENGTHS)


def dapo(p: Policies) -> Tensor:
    """Clip-higher, a mean over tokens, and the soft overlong punishment (equation 13) over the last 4 of 12 tokens."""
    cache, rewards = 4, list(p.rewards)
    for i in ROLLOUTS:
        if LENGTHS[i] > MAX_COMPLETION_LENGTH:
            rewards[i] -= 1
        elif LENGTHS[i] > MAX_COMPLETION_LENGTH - cache:
            rewards[i] += (MAX_COMPLETION_LENGTH - cache - LENGTHS[i]) / cache
    advantages = group_advantages(rewards)
    return -over_tokens(lambda i, t: ppo(ratio(p.pi[i][t], p.behaviour[i][t]), advantages[i], 0.2, 0.28))


def gspo(p: Policies) -> Tensor:
    """s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|), one clipped term for each rollout."""
    advantages, total = group_advantages(p.rewards), torch.zeros(())
    for i in ROLLOUTS:
        log_ratio = sum((p.pi[i][t] - p.behaviour[i][t] for t in range(LENGTHS[i])), torch.zeros(()))
        total = total + ppo(torch.exp(log_ratio / LENGTHS[i]), advantages[i], 3e-4, 4e-4)
    return -total / len(LENGTHS)


def cispo(p: Policies) -> Tensor:
    """sg(min(r, epsilon_max)) A log pi."""
    advantages = group_advantages(p.rewards)

    def term(i: int, t: int) -> Tensor:
        weight = min(ratio(p.pi[i][t], p.behaviour[i][t]).item(), 5.0)
        return weight * advantages[i] * p.pi[i][t]

    return -over_tokens(term)


def rloo(p: Policies) -> Tensor:
    """R = r - beta log(pi_behaviour(y) / pi_ref(y)), less the mean R of the others of the group; one clipped action."""
    beta, returns, total = 0.05, list(p.rewards), torch.zeros(())
    for i in ROLLOUTS:
        for t in range(LENGTHS[i]):
            returns[i] -= beta * (p.behaviour[i][t] - p.reference[i][t])
    for i in ROLLOUTS:
        others = mean([returns[j] for j in group_of(i) if j != i])
        log_ratio = sum((p.pi[i][t] - p.behaviour[i][t] for t in range(LENGTHS[i])), torch.zeros(()))
        total = total + ppo(torch.exp(log_ratio), returns[i] - others)
    return -total / len(LENGTHS)


def reinforce_plus_plus(p: Policies) -> Tensor:
    """A_t = r - beta sum of the KL from t on, normalised over all tokens of the batch."""
    beta, advantages = 0.01, []
    for i in ROLLOUTS:
        kl = [p.behaviour[i][t] - p.reference[i][t] for t in range(LENGTHS[i])]
        advantages.append([p.rewards[i] - beta * sum(kl[t:]) for t in range(LENGTHS[i])])
    of_batch = [advantage for of_rollout in advantages for advantage in of_rollout]
    centre, scale = mean(of_batch), std(of_batch) + 1e-4

    def term(i: int, t: int) -> Tensor:
        return ppo(ratio(p.pi[i][t], p.behaviour[i][t]), (advantages[i][t] - centre) / scale)

    return -over_tokens(term)


def reinforce_plus_plus_baseline(p: Policies) -> Tensor:
    """r - mean of the group, normalised over all tokens of the batch, and k2 as a loss."""
    beta, compared = 0.01, group_advantages(p.rewards, scaled=False)
    of_batch = [compared[i] for i in ROLLOUTS for _ in range(LENGTHS[i])]
    centre, scale = mean(of_batch), std(of_batch) + 1e-4

    def term(i: int, t: int) -> Tensor:
        r = ratio(p.pi[i][t], p.behaviour[i][t])
        k2 = (p.pi[i][t] - p.reference[i][t]) ** 2 / 2 * r.item()  # sampled by other weights
        return ppo(r, (compared[i] - centre) / scale) - beta * k2

    return -over_tokens(term)


def dual_clip(p: Policies) -> Tensor:
    """For A < 0: max(min(r A, clip(r) A), c A)."""
    c, advantages = 3.0, group_advantages(p.rewards)

    def term(i: int, t: int) -> Tensor:
        once = ppo(ratio(p.pi[i][t], p.behaviour[i][t]), advantages[i])
        return torch.maximum(once, torch.tensor(c * advantages[i])) if advantages[i] < 0 else once

    return -over_tokens(term)


def entropy_bonus(p: Policies) -> Tensor:
    advantages = group_advantages(p.rewards)
    policy = over_tokens(lambda i, t: ppo(ratio(p.pi[i][t], p.start[i][t]), advantages[i]) * truncated_weight(p, i, t))
    return -policy - 0.001 * over_tokens(lambda i, t: p.entropy[i][t])


def decoupled_ppo(p: Policies) -> Tensor:
    """(pi_prox / pi_behaviour) min(r A, clip(r) A) with r = pi / pi_prox, pi_prox the policy when the step began."""
    advantages = group_advantages(p.rewards)
    return -over_tokens(lambda i, t: truncated_weight(p, i, t) * ppo(ratio(p.pi[i][t], p.start[i][t]), advantages[i]))


def decoupled_ppo_interpolated(p: Policies) -> Tensor:
    """log pi_prox = log pi_behaviour + (v_prox - v_behaviour) / (v - v_behaviour) (log pi - log pi_behaviour)."""
    advantages = group_advantages(p.rewards)

    def term(i: int, t: int) -> Tensor:
        behaviour, now = p.behaviour[i][t], p.start[i][t]
        version, sampled_at = 100, 100 - p.ages[i][t]
        alpha = (version - 1 - sampled_at) / (version - sampled_at) if sampled_at < version else 1.0
        proximal = behaviour + alpha * (now - behaviour) if sampled_at < version else now
        return min(math.exp(proximal - behaviour), 3.0) * ppo(ratio(p.pi[i][t], proximal), advantages[i])

    return -over_tokens(term)


def truncated_is(p: Policies) -> Tensor:
    advantages = group_advantages(p.rewards)
    return -over_tokens(
        lambda i, t: truncated_weight(p, i, t, 2.0) * ppo(ratio(p.pi[i][t], p.start[i][t]), advantages[i])
    )


def icepop(p: Policies) -> Tensor:
    """M(k) min(r A, clip(r) A) with k = pi_start / pi_behaviour, and M(k) = k within [0.5, 5], 0 outside."""
    advantages = group_advantages(p.rewards)

    def term(i: int, t: int) -> Tensor:
        k = math.exp(p.start[i][t] - p.behaviour[i][t])
        masked = k if 0.5 <= k <= 5.0 else 0.0
        return masked * ppo(ratio(p.pi[i][t], p.start[i][t]), advantages[i])

    return -over_tokens(term)


def geometric_mask(p: Policies) -> Tensor:
    advantages = group_advantages(p.rewards)

    def term(i: int, t: int) -> Tensor:
        log_ratios = [p.start[i][s] - p.behaviour[i][s] for s in range(LENGTHS[i])]
        kept = 0.9 <= math.exp(mean(log_ratios)) <= 1.1
        return kept * truncated_weight(p, i, t) * ppo(ratio(p.pi[i][t], p.start[i][t]), advantages[i])

    return -over_tokens(term)


def off_policy_mask(p: Policies) -> Tensor:
    """M_i = 0 where A < 0 and the mean of log(pi_behaviour / pi) over the rollout exceeds delta."""
    advantages = group_advantages(p.rewards)

    def term(i: int, t: int) -> Tensor:
        kl = mean([p.behaviour[i][s] - p.pi[i][s].item() for s in range(LENGTHS[i])])
        masked = advantages[i] < 0 and kl > 0.05
        return ppo(ratio(p.pi[i][t], p.behaviour[i][t]), advantages[i]) * (not masked)

    return -over_tokens(term)


def on_policy_distillation(p: Policies) -> Tensor:
    """The advantage is the reward's, less beta log(pi_behaviour / pi_teacher) of the token alone."""
    compared, beta = group_advantages(p.rewards, scaled=False), 1.0

    def term(i: int, t: int) -> Tensor:
        advantage = compared[i] - beta * (p.behaviour[i][t] - p.reference[i][t])
        return ppo(ratio(p.pi[i][t], p.behaviour[i][t]), advantage)

    return -over_tokens(term)


METHODS: dict[str, Callable[[Policies], Tensor]] = {
    method.__name__: method
    for method in (
        grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_plus_plus, reinforce_plus_plus_baseline, dual_clip,
        entropy_bonus, decoupled_ppo, decoupled_ppo_interpolated, truncated_is, icepop, geometric_mask, off_policy_mask,
        on_policy_distillation,
    )
}  # fmt: skip
"""By the name of their recipe under recipes/methods/."""
