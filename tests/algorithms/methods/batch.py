"""One random batch for every method: sampled by old weights, trained by newer ones, in the middle of a step.

Four policies, which no method may confuse: the one that sampled each token, the one that the step began with, the one
that is trained (a table of logits, so that a gradient is compared for every logit), and the reference.

Legend: B = rollouts of the batch, C = longest completion, V = vocabulary, N = loss tokens of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from algorithms.config import GrpoConfig
from algorithms.logprobs import logprobs_and_entropy
from algorithms.losses import Normalizer, grpo_loss
from algorithms.signal import signal
from algorithms.stats import LossStats, merge
from algorithms.types import Group, GroupSummary, Prompt, Rollout, ScoredGroup, VersionSpan, summarize

VOCABULARY, EOS = 11, 1
GROUP_SIZE, MAX_COMPLETION_LENGTH, TEMPERATURE = 4, 12, 0.7
LENGTHS = (3, 9, 2, 12, 5, 7, 2, 10)
VERSION = 7


@dataclass(frozen=True)
class Drifted:
    """8 rollouts in 2 groups, ragged; `ages` are how many versions ago each token was sampled."""

    completions: tuple[tuple[int, ...], ...]
    logits_BCV: Tensor
    start_BCV: Tensor
    sampled: tuple[tuple[float, ...], ...]
    reference: tuple[tuple[float, ...], ...]
    ages: tuple[tuple[int, ...], ...]
    rewards: tuple[float | None, ...]

    @property
    def start(self) -> list[list[float]]:
        return _logprobs(self.start_BCV, self.completions)

    @property
    def groups(self) -> list[GroupSummary]:
        numbers = range(0, len(self.completions), GROUP_SIZE)
        return [summarize(self._scored(number), 0.0, 0.0) for number in numbers]

    def _scored(self, first: int) -> ScoredGroup:
        rows = range(first, first + GROUP_SIZE)
        prompt = Prompt(first // GROUP_SIZE, 0, (5, 6), "", {})
        group = Group(prompt, tuple(self._rollout(row) for row in rows), 0, 0)
        return ScoredGroup(group, tuple(self.rewards[row] for row in rows), {})

    def _rollout(self, row: int) -> Rollout:
        ids, ages = self.completions[row], self.ages[row]
        return Rollout(
            token_ids_T=np.array([5, 6, *ids], np.int32),
            loss_mask_T=np.array([False, False, *(True for _ in ids)]),
            logprobs_T=np.array([0.0, 0.0, *self.sampled[row]]),
            spans=tuple(VersionSpan(VERSION - age, 2 + at, 3 + at) for at, age in enumerate(ages)),
            finish_reason="stop",
            reference_logprobs_T=np.array([0.0, 0.0, *self.reference[row]]),
        )


def drifted(seed: int, *, drift: float = 0.3, stale: bool = True) -> Drifted:
    """`stale` False: the step's first weights have sampled everything."""
    random = torch.Generator().manual_seed(seed)
    completions = [torch.randint(2, VOCABULARY, (length,), generator=random).tolist() for length in LENGTHS]
    for ids in completions:
        ids[-1] = EOS
    tables = torch.randn(4, len(LENGTHS), max(LENGTHS), VOCABULARY, generator=random)
    start_BCV = tables[0]
    behind_BCV = start_BCV + drift * tables[1] if stale else start_BCV
    # Later tokens were sampled by younger weights.
    ages = [sorted(torch.randint(0, 4, (length,), generator=random).tolist(), reverse=True) for length in LENGTHS]
    return Drifted(
        completions=tuple(map(tuple, completions)),
        logits_BCV=start_BCV + drift * tables[2],
        start_BCV=start_BCV,
        sampled=tuple(map(tuple, _logprobs(behind_BCV, completions))),
        reference=tuple(map(tuple, _logprobs(start_BCV + drift * tables[3], completions))),
        ages=tuple(map(tuple, ages)) if stale else tuple((0,) * length for length in LENGTHS),
        rewards=tuple(torch.randn(len(LENGTHS), generator=random).tolist()),
    )


def our_loss(
    batch: Drifted, config: GrpoConfig, micro_batches: Sequence[Sequence[int]]
) -> tuple[float, Tensor, LossStats]:
    """From the rewards to the loss, its gradient in the table of logits, and its statistics."""
    logits_BCV = batch.logits_BCV.clone().requires_grad_()
    worth = signal(batch.groups, config, MAX_COMPLETION_LENGTH)
    advantages_B = [advantage for group in worth.advantages for advantage in group]
    normalizer = Normalizer(len(LENGTHS), sum(LENGTHS), MAX_COMPLETION_LENGTH, len(micro_batches), worth.kl_weight)
    total, stats = torch.zeros(()), []
    for rows in micro_batches:
        share, measured = _share(batch, logits_BCV, advantages_B, rows, config, normalizer)
        total = total + share
        stats.append(measured)
    (gradient_BCV,) = torch.autograd.grad(total, logits_BCV)
    return total.item(), gradient_BCV, merge(stats)


def _share(
    batch: Drifted,
    logits_BCV: Tensor,
    advantages_B: Sequence[float],
    rows: Sequence[int],
    config: GrpoConfig,
    normalizer: Normalizer,
) -> tuple[Tensor, LossStats]:
    lengths = [LENGTHS[row] for row in rows]
    row_N = torch.tensor([row for row in rows for _ in range(LENGTHS[row])])
    column_N = torch.tensor([column for length in lengths for column in range(length)])

    def flat(values: Sequence[Sequence[float]]) -> Tensor:
        return torch.tensor([value for row in rows for value in values[row]])

    targets_N = torch.tensor([token for row in rows for token in batch.completions[row]])
    logprobs_N, entropy_N = logprobs_and_entropy(logits_BCV[row_N, column_N], targets_N, TEMPERATURE, chunk_size=4)
    return grpo_loss(
        logprobs_N,
        entropy_N,
        flat(batch.sampled),
        flat(batch.reference),
        torch.tensor(advantages_B)[row_N],
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        num_sequences=len(rows),
        config=config,
        normalizer=normalizer,
        age_N=torch.tensor([age for row in rows for age in batch.ages[row]]),
        start_logprobs_N=flat(batch.start),
    )


def _logprobs(logits_BCV: Tensor, completions: Sequence[Sequence[int]]) -> list[list[float]]:
    table_BCV = (logits_BCV / TEMPERATURE).log_softmax(-1)
    return [[table_BCV[row, at, token].item() for at, token in enumerate(ids)] for row, ids in enumerate(completions)]
