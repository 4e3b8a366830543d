"""What a batch's weights depend on besides its rewards is asked of the policy's ranks, before the step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import ray

from actors.pacer import ReadyGroup
from actors.policy_calls import ReferenceSums
from actors.policy_group import PolicyGroup
from algorithms.types import Batch, Group, GroupSummary

Build = Callable[[Sequence[GroupSummary]], Batch]
"""The batch that the summaries make by themselves."""


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
        bare = build([_bare(group.summary) for group in groups])
        found = await self.policy.references(bare, scored)
        return Lesson(build([_with_sums(group.summary, place, found) for place, group in enumerate(groups)]), scored)


def _bare(summary: GroupSummary) -> GroupSummary:
    """Every rollout, and nothing said of any; the reward of one that was truncated is part of its group's baseline."""
    nothing = (None,) * len(summary.rewards_G)
    return replace(summary, rewards_G=nothing, truncated_G=(False,) * len(nothing))


def _with_sums(summary: GroupSummary, place: int, found: Mapping[tuple[int, int], ReferenceSums]) -> GroupSummary:
    return replace(summary, kl_G=tuple(found[place, rollout].kl for rollout in range(len(summary.rewards_G))))
