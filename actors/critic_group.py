"""The critic as one: it says what every token of a batch was worth, and then learns from the batch itself."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray

from actors.critic import Assessed
from actors.deadline import aside, within
from actors.policy_group import PolicyGroup
from algorithms.config import GrpoConfig
from algorithms.gae import whitened
from algorithms.packing import build_batch, with_token_advantages
from algorithms.signal import penalised_rewards
from algorithms.types import Batch, Group, GroupSummary

_RENAMED = {
    "loss": "value/loss",
    "grad_norm": "value/grad_norm",
    "learning_rate": "value/learning_rate",
    "policy/skipped": "value/skipped",
    "time/policy_step_s": "time/critic_step_s",
}
"""What a group of ranks measures, by what it is called of a critic; the names that begin with value/ stay."""

Place = tuple[int, int]
"""A group of the batch and a rollout of the group."""


@dataclass(frozen=True, slots=True)
class CriticLesson:
    """What a batch says to policy and critic; a rollout without a reward says nothing to either."""

    advantages: Mapping[Place, NDArray[np.float32]]
    """Of each loss token of a rollout, for the policy."""
    batch: Batch
    """For the critic: its own micro-batches, with returns in place of advantages."""
    seconds: float


@dataclass(frozen=True, slots=True)
class CriticGroup:
    """All critic ranks."""

    ranks: PolicyGroup
    algorithm: GrpoConfig
    max_tokens_per_micro_batch: int
    warmup_steps: int
    turn: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext
    """Open while it computes: no engine is built on GPUs that it shares."""

    async def compute_values(
        self, groups: Sequence[GroupSummary], scored: Sequence[ray.ObjectRef | Group], batch: Batch
    ) -> CriticLesson:
        """Values of all loss tokens by the critic as it is now, and what follows from them; `batch` is the policy's."""
        started = time.perf_counter()
        asked = self._asked(groups, batch)
        what = f"the critic's values at version {batch.version}"
        async with self.turn():
            found: dict[Place, Assessed] = await self.ranks.of_each("compute_values", asked, scored, what)
        deciding = aside(_advantages, found, self.algorithm.normalize_advantages == "tokens")
        advantages = await within(self.ranks.timeout_s, deciding, "whitening the advantages")
        returns = {place: assessed.returns_L for place, assessed in found.items()}
        return CriticLesson(advantages, with_token_advantages(asked, returns), time.perf_counter() - started)

    def _asked(self, groups: Sequence[GroupSummary], batch: Batch) -> Batch:
        """The scored rollouts that the policy trains on, each with its reward in place of an advantage."""
        rewards = penalised_rewards(groups, self.algorithm, self.ranks.max_completion_length)
        known = [
            [reward if length else None for reward, length in zip(of_group, group.num_loss_tokens_G, strict=True)]
            for of_group, group in zip(rewards, groups, strict=True)
        ]
        return build_batch(
            groups,
            known,
            version=batch.version,
            oldest_version=batch.oldest_version,
            num_ranks=self.ranks.num_teams,
            max_tokens=self.max_tokens_per_micro_batch,
            mask_truncated=self.algorithm.mask_truncated_completions,
            costs=self.ranks.costs,
        )

    async def train_step(self, lesson: CriticLesson, scored: Sequence[ray.ObjectRef | Group]) -> dict[str, float]:
        """Learn the returns; the metrics."""
        async with self.turn():
            update = await self.ranks.step(lesson.batch, scored)
        metrics = {_RENAMED.get(name, name): value for name, value in update.metrics.items()}
        metrics["time/critic_values_s"] = lesson.seconds
        named = {name: value for name, value in metrics.items() if name.startswith(("value/", "time/critic_"))}
        return {name: value for name, value in named.items() if math.isfinite(value)}


def _advantages(found: Mapping[Place, Assessed], whiten: bool) -> dict[Place, NDArray[np.float32]]:
    """Over the tokens that are trained, if they are to be whitened."""
    advantages = [assessed.advantages_L for assessed in found.values()]
    if whiten:
        advantages = whitened(advantages, [assessed.fresh_L for assessed in found.values()])
    return dict(zip(found, advantages, strict=True))
