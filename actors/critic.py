"""A critic rank is a policy rank whose model says what is still to be earned; what it learns are returns.

Model, packing, optimizer, ZeRO and checkpoints are the policy's; the objective (objective.py, `values`) is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.policy import CONTROL, IO, PolicyActor
from actors.policy_calls import RankBatch
from algorithms.gae import gae, token_rewards
from algorithms.types import Group, MicroBatch, ScoredGroup


@dataclass(frozen=True, slots=True)
class Assessed:
    """One rollout by the critic: an entry for each of its L loss tokens."""

    advantages_L: NDArray[np.float32]
    """Not whitened yet: that takes the whole batch."""
    returns_L: NDArray[np.float32]
    """What the critic is to learn."""
    fresh_L: NDArray[np.bool_]
    """Whether the token is young enough to be trained on."""


class CriticActor(PolicyActor):
    """One rank of the critic."""

    def compute_values(self, batch: RankBatch, *groups: ScoredGroup | Group) -> list[list[Assessed]]:
        """Each sample of each micro-batch, whose reward takes the place of its advantage; every rank is called."""
        self.engine.eval()
        assessed = [self._assessed(micro_batch, groups, batch.oldest_version) for micro_batch in batch.micro_batches]
        self.engine.train()
        self._leave_room()
        return assessed

    def _assessed(
        self, micro_batch: MicroBatch, groups: Sequence[ScoredGroup | Group], oldest_version: int
    ) -> list[Assessed]:
        algorithm = self.settings.objective.grpo
        assert algorithm is not None, "a critic is told the algorithm that it is the critic of"
        row = self._row(micro_batch, groups, oldest_version)
        with torch.no_grad():
            values_N, _ = self._values(row)
        # In float64 and on the CPU: a loop over the tokens of the longest sequence.
        row, values_N = row.to(torch.device("cpu")), values_N.double().cpu()
        kl_N = None
        if algorithm.kl_penalty == "reward" and row.reference_logprobs_N is not None:
            kl_N = (row.sampled_logprobs_N - row.reference_logprobs_N).nan_to_num(0.0).double()
        rewards_S = torch.tensor([sample.advantage for sample in micro_batch.samples], dtype=torch.float64)
        rewards_N = token_rewards(rewards_S, kl_N, row.sequence_N, algorithm.beta)
        advantages_N = gae(rewards_N, values_N, row.sequence_N, algorithm.gamma, algorithm.lam)
        ends = torch.bincount(row.sequence_N, minlength=len(rewards_S)).cumsum(0)[:-1].tolist()
        arrays = (advantages_N.float(), (advantages_N + values_N).float(), row.fresh_N)
        parts = zip(*(np.split(each.numpy(), ends) for each in arrays), strict=True)
        return [
            Assessed(*part) for part, _ in zip(parts, micro_batch.samples, strict=False)
        ]  # of none np.split has one


def critic_actor() -> Any:
    """The class to make ranks of; its concurrency groups can be given to Ray at no later moment."""
    import ray

    remote: Any = ray.remote
    return remote(concurrency_groups={CONTROL: 1, IO: 1})(CriticActor)
