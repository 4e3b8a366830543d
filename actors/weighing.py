"""What a batch's weights depend on besides its rewards is asked of the policy's ranks, before the step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import ray

from actors.data.examples import ExampleStream
from actors.errors import RunError
from actors.pacer import ReadyGroup
from actors.policy_calls import ReferenceSums
from actors.policy_group import PolicyGroup
from actors.run.batches import group_of
from algorithms.gkd import token_weights
from algorithms.preference.config import OnlineDpoConfig
from algorithms.preference.online import pair_weights, sampled_pairs
from algorithms.types import Batch, Group, GroupSummary, ScoredGroup, VersionSpan, summarize

Weights = Sequence[Sequence[float | None]]
"""One for each rollout of each group; None leaves it out of the batch."""


class Build(Protocol):
    """The batch that the summaries make, by their rewards or with the weights that are given."""

    def __call__(self, summaries: Sequence[GroupSummary], weights: Weights | None = None, /) -> Batch: ...


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one step trains on."""

    batch: Batch
    groups: Sequence[ray.ObjectRef | Group]
    """What the batch's samples name by their places."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """In place of the ranks' own of the same name."""


class Weighing(Protocol):
    """How a batch becomes a lesson."""

    async def lesson(self, groups: Sequence[ReadyGroup], build: Build) -> Lesson:
        """The policy holds the version that the step begins with."""


@dataclass(frozen=True, slots=True)
class ByRewards:
    """Everything is in the summaries."""

    async def lesson(self, groups: Sequence[ReadyGroup], build: Build) -> Lesson:
        return Lesson(build([group.summary for group in groups]), [group.scored for group in groups])


@dataclass(frozen=True, slots=True)
class ByKl:
    """The rewards are less what their KL divergence costs, and the reference is the policy without its adapter."""

    policy: PolicyGroup

    async def lesson(self, groups: Sequence[ReadyGroup], build: Build) -> Lesson:
        scored = [group.scored for group in groups]
        bare = build([_untruncated(group.summary) for group in groups], _nothing(groups))
        found = await self.policy.references(bare, scored)
        return Lesson(build([_with_sums(group.summary, place, found) for place, group in enumerate(groups)]), scored)


def _nothing(groups: Sequence[ReadyGroup]) -> list[tuple[float, ...]]:
    """Every rollout, and nothing said of any."""
    return [(0.0,) * len(group.summary.rewards_G) for group in groups]


def _untruncated(summary: GroupSummary) -> GroupSummary:
    """The reward of a rollout that was truncated is part of its group's baseline."""
    return replace(summary, truncated_G=(False,) * len(summary.truncated_G))


def _with_sums(summary: GroupSummary, place: int, found: Mapping[tuple[int, int], ReferenceSums]) -> GroupSummary:
    return replace(summary, kl_G=tuple(found[place, rollout].kl for rollout in range(len(summary.rewards_G))))


@dataclass(frozen=True, slots=True)
class ByTeacher:
    """Each token weighs the same, those that the student sampled and those of the data; no reward does."""

    lmbda: float
    num_examples: int
    """That each step learns beside the samples."""
    examples: ExampleStream | None
    """The data's completions; None when nothing is learned from them."""

    async def lesson(self, groups: Sequence[ReadyGroup], build: Build) -> Lesson:
        summaries, scored = [group.summary for group in groups], [group.scored for group in groups]
        bare = build(summaries, _nothing(groups))
        beside = [] if self.examples is None else self._beside(self.examples, bare.version)
        read = [summarize(example, 0.0, 0.0) for example in beside]
        kept = {(sample.group, sample.rollout) for rank in bare.ranks for micro in rank for sample in micro.samples}
        of_student = [summaries[group].num_loss_tokens_G[rollout] for group, rollout in kept]
        of_data = [tokens for summary in read for tokens in summary.num_loss_tokens_G]
        sampled, data = token_weights(of_student, of_data, self.lmbda)
        weights = [(sampled,) * len(summary.rewards_G) for summary in summaries] + [(data,)] * len(read)
        return Lesson(build([*summaries, *read], weights), [*scored, *(example.group for example in beside)])

    def _beside(self, stream: ExampleStream, version: int) -> list[ScoredGroup]:
        """The examples of this step, each token as if it were of the version that learns it: none is ever stale."""
        first = version * self.num_examples
        return [_example(stream, ordinal, version) for ordinal in range(first, first + self.num_examples)]


def _example(stream: ExampleStream, ordinal: int, version: int) -> ScoredGroup:
    try:
        rollout = stream.example(ordinal)
    except ValueError as error:  # a row behind those that were looked at before the run
        raise RunError(str(error)) from error
    spans = (VersionSpan(version, 0, rollout.num_tokens),)
    return ScoredGroup(group_of(ordinal, (replace(rollout, spans=spans),)), (None,), {})


@dataclass(frozen=True, slots=True)
class ByPairs:
    """Best and worst of each group weigh what DPO's loss of all pairs says; the others are left out."""

    policy: PolicyGroup
    config: OnlineDpoConfig
    beta: float
    mask_truncated: bool

    async def lesson(self, groups: Sequence[ReadyGroup], build: Build) -> Lesson:
        summaries, scored = [group.summary for group in groups], [group.scored for group in groups]
        pairs = sampled_pairs(summaries, self.mask_truncated)
        places = {(pair.group, side) for pair in pairs for side in (pair.chosen, pair.rejected)}
        bare = build(summaries, _placed(summaries, dict.fromkeys(places, 0.0)))
        numbers = await self.policy.numbers(bare, scored) if pairs else {}
        sums = await self.policy.references(bare, scored) if pairs else {}
        reference = {place: each.logprob for place, each in sums.items()}
        tokens = {(group, side): summaries[group].num_loss_tokens_G[side] for group, side in places}
        weights, metrics = pair_weights(pairs, numbers, reference, tokens, self.config, self.beta)
        if not math.isfinite(metrics["loss"]):  # then no weight is one, either: the ranks skip the step, all alike
            weights = dict.fromkeys(places, math.nan)
        measured = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return Lesson(build(summaries, _placed(summaries, weights)), scored, measured)


def _placed(summaries: Sequence[GroupSummary], weights: Mapping[tuple[int, int], float]) -> Weights:
    """A weight for each rollout; None for those that have none."""
    return [
        [weights.get((group, rollout)) for rollout in range(len(summary.rewards_G))]
        for group, summary in enumerate(summaries)
    ]
