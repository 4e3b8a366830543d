"""Step n of a run that samples nothing trains on the n-th examples of its data, whenever and however often it goes on.

A lesson says which sequences those are and what their loss is; run/sft.py takes care of everything else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actors.data.examples import ExampleStream
from actors.data.preferences import JudgementStream, PairStream
from actors.errors import RunError
from actors.policy_group import PolicyGroup
from actors.recipe.base import OfflineRecipe
from actors.recipe.preference import KtoRecipe, PairRecipe, PreferenceRecipe
from actors.run.batches import batch_of, group_of
from actors.run.preference import Judging, Pairing
from actors.run.references import References
from algorithms.types import Rollout, Update

Stream = ExampleStream | PairStream | JudgementStream


class Lesson(Protocol):
    """What a run learns."""

    async def prepare(self, steps: range, stopped: Callable[[], bool]) -> None:
        """Done once, before these steps and with the weights that the run began with; no longer than until `stopped`,
        and then there is no step."""

    async def step(self, step: int) -> tuple[Update, int]:
        """Train once; also how many tokens were learned."""


def lesson_of(
    recipe: OfflineRecipe, stream: Stream, policy: PolicyGroup, folder: Path, say: Callable[[str], None]
) -> Lesson:
    """The lesson that the recipe asks for."""
    if isinstance(stream, ExampleStream):
        return Supervision(recipe, stream, policy)
    assert isinstance(recipe, PreferenceRecipe)
    references = References(policy, folder, recipe.policy.max_tokens_per_micro_batch, say)
    if isinstance(stream, JudgementStream):
        assert isinstance(recipe, KtoRecipe)
        return Judging(recipe, stream, policy, references)
    assert isinstance(recipe, PairRecipe)
    return Pairing(recipe, stream, policy, references)


@dataclass(frozen=True, slots=True)
class Supervision:
    """The loss is the mean negative log-likelihood of the tokens that are learned."""

    recipe: OfflineRecipe
    examples: ExampleStream
    policy: PolicyGroup

    async def prepare(self, steps: range, stopped: Callable[[], bool]) -> None:
        """Nothing."""

    async def step(self, step: int) -> tuple[Update, int]:
        first = step * self.recipe.batch_size
        rollouts = _examples(self.examples, range(first, first + self.recipe.batch_size))
        groups = [group_of(first + place, (rollout,)) for place, rollout in enumerate(rollouts)]
        max_tokens = self.recipe.policy.max_tokens_per_micro_batch
        batch = batch_of(groups, [(0.0,)] * len(groups), step, self.policy, max_tokens)
        return await self.policy.step(batch, groups), batch.num_loss_tokens


def _examples(examples: ExampleStream, ordinals: Sequence[int]) -> list[Rollout]:
    try:
        return [examples.example(ordinal) for ordinal in ordinals]
    except ValueError as error:  # a row behind those that were looked at before the run
        raise RunError(str(error)) from error
