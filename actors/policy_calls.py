"""What a policy rank is told, and what it answers."""

from dataclasses import dataclass
from typing import Any

from actors.objective import Objective
from actors.recipe.policy import PolicyConfig
from algorithms.config import OptimizerConfig
from algorithms.losses import Normalizer
from algorithms.types import KlSums, MicroBatch


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where every worker loads the same weights and tokenizer from."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """All that a rank needs to know; the same on every rank but for `rank`."""

    model_path: str
    revision: str | None
    trust_remote_code: bool
    num_ranks: int
    use_gpu: bool
    seed: int
    num_steps: int
    policy: PolicyConfig
    optimizer: OptimizerConfig
    objective: Objective
    run_dir: str
    """Where the model will be saved; rank 0's node must see it."""
    teacher: ModelSource | None = None
    """The model that the objective compares with, of which each rank holds a copy."""
    shares_gpu: bool = False
    """Others live on the rank's GPU: what a step needs and no longer holds goes back to it."""


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One rank's share of a batch; samples name groups by their place among the groups passed along."""

    micro_batches: tuple[MicroBatch, ...]
    normalizer: Normalizer
    oldest_version: int
    """Tokens sampled by weights older than this leave the loss."""


@dataclass(frozen=True, slots=True)
class ReferenceSums:
    """What the reference says of one sequence."""

    logprob: float
    """Of its loss tokens, summed."""
    kl: KlSums
    """Of those that were sampled."""


@dataclass(frozen=True, slots=True)
class RankUpdate:
    """What one rank did in a step; summed and merged over the ranks by the controller."""

    version: int
    loss: float
    """This rank's share of the loss of the global batch."""
    grad_norm: float
    """Of the global gradient, before clipping; the same on every rank."""
    learning_rate: float
    stats: dict[str, Any]
    """LossStats as a plain dict."""
    learning_rate_factor: float = 1.0
    """What the schedule's learning rate was multiplied by."""
    skipped: bool = False
    """Loss or gradient were not finite: the weights and AdamW's state are as they were; the same on every rank."""
    num_updates: int = 1
    """Of the optimizer: `num_iterations`, or fewer when one was not finite, which ends the step."""
