"""The loss of a step is over all its examples at once, and its gradient exact, wherever each sequence is trained.

First every rank says what its sequences amount to; from those numbers follow the loss and what each sequence weighs in
its gradient (`algorithms/preference/weigh.py`); then each rank trains on its sequences with those weights. The two
passes pack the same sequences; the first needs no gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from actors.data.preferences import Judgement, JudgementStream, Pair, PairStream, mismatched
from actors.errors import RunError
from actors.policy_group import PolicyGroup
from actors.recipe.preference import KtoRecipe, PairRecipe, PreferenceRecipe, RewardRecipe
from actors.run.batches import batch_of, group_of
from actors.run.references import References
from algorithms.preference.batch import Judged, Pairs
from algorithms.preference.config import DpoConfig, KtoConfig
from algorithms.preference.kto import kl_estimate
from algorithms.preference.weigh import Weighed, weigh_judged, weigh_pairs
from algorithms.types import Group, Rollout, Update


@dataclass(frozen=True, slots=True)
class Pairing:
    """Chosen answers against rejected ones: DPO, ORPO, CPO, and reward models."""

    recipe: PairRecipe
    stream: PairStream
    policy: PolicyGroup
    references: References

    async def prepare(self, steps: range, stopped: Callable[[], bool]) -> None:
        if isinstance(self.recipe.algorithm, DpoConfig):
            await self.references.compute(
                steps, lambda step: _sequences(self._groups(step, self._pairs(step))), stopped
            )

    async def step(self, step: int) -> tuple[Update, int]:
        pairs = self._pairs(step)
        groups = self._groups(step, pairs)
        numbers = await _numbers(self.policy, groups, step, self.recipe)
        weighed = weigh_pairs(self._numbered(groups, pairs, numbers), self.recipe.algorithm)
        return await _train(self.policy, groups, weighed, step, self.recipe)

    def _numbered(self, groups: Sequence[Group], pairs: Sequence[Pair], numbers: dict[tuple[int, int], float]) -> Pairs:
        chosen_P, rejected_P = (_tensor([numbers[place, side] for place in range(len(groups))]) for side in range(2))
        chosen, rejected = ([group.rollouts[side] for group in groups] for side in range(2))
        return Pairs(
            chosen_P,
            rejected_P,
            chosen_tokens_P=_tensor([rollout.num_loss_tokens for rollout in chosen]),
            rejected_tokens_P=_tensor([rollout.num_loss_tokens for rollout in rejected]),
            reference_chosen_P=self._reference(chosen),
            reference_rejected_P=self._reference(rejected),
            margin_P=_tensor([pair.margin or 0.0 for pair in pairs]),
        )

    def _reference(self, rollouts: Sequence[Rollout]) -> Tensor | None:
        if not isinstance(self.recipe.algorithm, DpoConfig):
            return None
        return _tensor([self.references.of(rollout) for rollout in rollouts])

    def _pairs(self, step: int) -> list[Pair]:
        first = step * self.recipe.batch_size
        try:
            return [self.stream.pair(first + place) for place in range(self.recipe.batch_size)]
        except ValueError as error:  # a row behind those that were looked at before the run
            raise RunError(str(error)) from error

    def _groups(self, step: int, pairs: Sequence[Pair]) -> list[Group]:
        first = step * self.recipe.batch_size
        return [group_of(first + n, (self._seen(p.chosen), self._seen(p.rejected))) for n, p in enumerate(pairs)]

    def _seen(self, rollout: Rollout) -> Rollout:
        """A reward model sees the whole sequence and gives its score at the end."""
        if not isinstance(self.recipe, RewardRecipe):
            return rollout
        return _end(rollout, int(self.stream.tokenizer.pad_token_id or 0))


@dataclass(frozen=True, slots=True)
class Judging:
    """Good completions and bad ones: KTO."""

    recipe: KtoRecipe
    stream: JudgementStream
    policy: PolicyGroup
    references: References

    async def prepare(self, steps: range, stopped: Callable[[], bool]) -> None:
        await self.references.compute(
            steps, lambda step: _sequences(self._groups(step, self._judgements(step))), stopped
        )

    async def step(self, step: int) -> tuple[Update, int]:
        judgements = self._judgements(step)
        groups = self._groups(step, judgements)
        numbers = await _numbers(self.policy, groups, step, self.recipe)
        good_S = torch.tensor([judgement.good for judgement in judgements])
        logprobs_S, reference_S = self._both(groups, numbers, 0)
        kl = torch.zeros((), dtype=torch.float64)
        if self.recipe.algorithm.loss_type == "kto":
            kl = kl_estimate(*self._both(groups, numbers, 1))
        weighed = weigh_judged(Judged(logprobs_S, reference_S, good_S, kl), self.recipe.algorithm)
        return await _train(self.policy, groups, weighed, step, self.recipe)

    def _both(
        self, groups: Sequence[Group], numbers: dict[tuple[int, int], float], rollout: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of one rollout of each group, under the policy and under the reference."""
        mine = [numbers[place, rollout] for place in range(len(groups))]
        return _tensor(mine), _tensor([self.references.of(group.rollouts[rollout]) for group in groups])

    def _judgements(self, step: int) -> list[Judgement]:
        first = step * self.recipe.batch_size
        try:
            return [self.stream.judgement(first + place) for place in range(self.recipe.batch_size)]
        except ValueError as error:  # a row behind those that were looked at before the run
            raise RunError(str(error)) from error

    def _groups(self, step: int, judgements: Sequence[Judgement]) -> list[Group]:
        """Each example, and behind it for `kto` its prompt with the completion of the example before."""
        first, config = step * self.recipe.batch_size, self.recipe.algorithm
        examples = [judgement.example for judgement in judgements]
        return [group_of(first + n, self._rollouts(examples, n, config)) for n in range(len(examples))]

    def _rollouts(self, examples: Sequence[Rollout], place: int, config: KtoConfig) -> tuple[Rollout, ...]:
        if config.loss_type != "kto":
            return (examples[place],)
        return examples[place], mismatched(examples[place], examples[place - 1], self.recipe.max_length)


async def _numbers(
    policy: PolicyGroup, groups: Sequence[Group], step: int, recipe: PreferenceRecipe
) -> dict[tuple[int, int], float]:
    """What every sequence of the groups amounts to under the current weights."""
    nothing = [(0.0,) * len(group.rollouts) for group in groups]
    batch = batch_of(groups, nothing, step, policy, recipe.policy.max_tokens_per_micro_batch)
    return await policy.numbers(batch, groups)


async def _train(
    policy: PolicyGroup, groups: Sequence[Group], weighed: Weighed, step: int, recipe: PreferenceRecipe
) -> tuple[Update, int]:
    max_tokens = recipe.policy.max_tokens_per_micro_batch
    weights = weighed.weights
    if not math.isfinite(weighed.loss):  # then no weight is one, either: the ranks skip the step, all alike
        weights = tuple((math.nan,) * len(of_group) for of_group in weights)
    batch = batch_of(groups, weights, step, policy, max_tokens)
    update = await policy.step(batch, groups)
    measured = {name: value for name, value in weighed.metrics.items() if math.isfinite(value)}
    metrics = {**update.metrics, "loss": weighed.loss, **measured}
    if isinstance(recipe, RewardRecipe):
        metrics.pop("entropy", None)  # scores have none
    return replace(update, metrics=metrics), batch.num_loss_tokens


def _sequences(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def _end(rollout: Rollout, pad_id: int) -> Rollout:
    """The sequence, of which one token alone counts: the last that is not padding.

    There transformers looks for the score, and where EOS is also the padding, that is the token before EOS.
    """
    last = int(np.flatnonzero(rollout.token_ids_T != pad_id)[-1])
    return replace(rollout, loss_mask_T=np.arange(rollout.num_tokens) == last)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
