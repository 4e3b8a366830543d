"""Sequences that nobody sampled become a batch: over all ranks each of them exactly once."""

from collections.abc import Sequence

import numpy as np

from actors.policy_group import PolicyGroup
from algorithms.packing import Sequences, pack_sharing
from algorithms.types import Batch, Group, MicroBatch, Prompt, Rollout, Sample


def group_of(ordinal: int, rollouts: tuple[Rollout, ...]) -> Group:
    """An example as a group: nothing was sampled, so there is no replica and no version."""
    prompt = Prompt(ordinal, epoch=0, token_ids=(), text="", columns={})
    return Group(prompt, rollouts, attempt=0, replica=-1)


def batch_of(
    groups: Sequence[Group], weights: Sequence[Sequence[float]], version: int, policy: PolicyGroup, max_tokens: int
) -> Batch:
    """The first sequences of each group, one for each of its weights, which take the place of advantages."""
    samples = [
        Sample(place, rollout, group.rollouts[rollout].num_tokens, weight)
        for place, (group, of_group) in enumerate(zip(groups, weights, strict=True))
        for rollout, weight in enumerate(of_group)
    ]
    learned = [groups[sample.group].rollouts[sample.rollout].num_loss_tokens for sample in samples]
    costs = [policy.costs.of(sample.num_tokens, count) for sample, count in zip(samples, learned, strict=True)]
    prompts = [policy.costs.shared(_num_alike(groups[sample.group].rollouts)) for sample in samples]
    sequences = Sequences([s.num_tokens for s in samples], costs, [s.group for s in samples], prompts)
    packed = pack_sharing(sequences, policy.num_teams, max_tokens)
    return Batch(
        version=version,
        ranks=tuple(tuple(MicroBatch(tuple(samples[i] for i in micro)) for micro in rank) for rank in packed),
        num_sequences=len(samples),
        num_loss_tokens=sum(learned),
        oldest_version=0,
    )


def _num_alike(rollouts: Sequence[Rollout]) -> int:
    """Tokens of the prompt that all of these have; 0 when they do not have one."""
    prompts = [rollout.token_ids_T[: int(np.argmax(rollout.loss_mask_T))] for rollout in rollouts]
    return len(prompts[0]) if all(np.array_equal(prompt, prompts[0]) for prompt in prompts) else 0
