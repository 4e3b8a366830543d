"""What the recipes of all kinds have in common, and what those have that learn from data alone."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from actors.checkpoint.config import CheckpointConfig
from actors.recipe.closed import CLOSED
from actors.recipe.data import DatasetConfig
from actors.recipe.model import ModelConfig
from actors.recipe.policy import PolicyConfig
from actors.recipe.upkeep import LoggingConfig
from algorithms.config import OptimizerConfig
from algorithms.learning_rate import refusals_of_lengths
from placement.config import PoolsConfig


class BaseRecipe(BaseModel):
    """What a recipe of any kind says."""

    model_config = CLOSED

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?$")
    """Name of the run: lower-case letters, digits and dashes, at most 47 characters."""
    seed: int = Field(0, ge=0)
    """Of the order of the rows, of sampling, and of what is drawn in training; asynchronous runs do not repeat to the
    bit all the same."""
    steps: int = Field(ge=1)
    """Updates of the policy."""
    run_dir: Path | None = None
    """Where the run leaves everything; null takes `runs/<name>`."""
    model: ModelConfig
    dataset: DatasetConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    policy: PolicyConfig = PolicyConfig()
    pools: PoolsConfig = PoolsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _one_gpu_a_rank(self) -> Self:
        pools = {"policy": self.pools.policy, "reference": self.pools.reference, "critic": self.pools.critic}
        for name, pool in pools.items():
            gpus = 0 if pool is None else pool.gpus_per_worker
            if gpus > 1:
                raise ValueError(
                    f"pools.{name}.gpus_per_worker: {gpus}, but each {name} worker drives one GPU; raise "
                    f"pools.{name}.num_workers instead"
                )
        return self

    @model_validator(mode="after")
    def _schedules_within_the_run(self) -> Self:
        optimizer = self.optimizer
        kind, arguments = optimizer.lr_scheduler_type, optimizer.lr_scheduler_kwargs
        for refusal in refusals_of_lengths(kind, arguments, optimizer.warmup_steps, self.steps):
            raise ValueError(f"optimizer.{refusal}")
        return self

    @model_validator(mode="after")
    def _makes_whole_teams(self) -> Self:
        check_teams("policy", self.policy.sequence_parallel_size, self.pools.policy.num_workers)
        return self

    @model_validator(mode="after")
    def _has_kernels_for_gpus(self) -> Self:
        if self.policy.liger is True and self.pools.policy.gpus_per_worker == 0:
            raise ValueError(
                "policy.liger: liger-kernel runs on GPUs alone, and the policy pool has none; set "
                "pools.policy.gpus_per_worker to 1, or policy.liger to auto"
            )
        return self

    @property
    def num_teams(self) -> int:
        """Among how many a batch is shared out: the policy's ranks, or teams of them."""
        return self.pools.policy.num_workers // self.policy.sequence_parallel_size

    @property
    def _learners(self) -> str:
        """What they are, in messages."""
        size = self.policy.sequence_parallel_size
        return "ranks" if size == 1 else f"teams of {size} ranks"

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.name


def check_teams(section: Literal["policy", "critic"], size: int, num_ranks: int) -> None:
    """ValueError when that many ranks do not make whole teams."""
    if num_ranks % size:
        raise ValueError(
            f"{section}.sequence_parallel_size: {num_ranks} ranks make no teams of {size}; set "
            f"pools.{section}.num_workers to a multiple of {size}, such as {-(-num_ranks // size) * size}, or the size "
            f"to a divisor of {num_ranks}"
        )


class OfflineRecipe(BaseRecipe):
    """A run that samples nothing: each step trains on the next examples of the data."""

    batch_size: int = Field(ge=1)
    """Examples that one update trains on: sequences, or pairs of sequences that are compared."""
    max_length: int = Field(1024, ge=2)
    """Longest sequence (tokens), prompt and completion together; a longer one is an error that names the row."""

    @model_validator(mode="after")
    def _feeds_every_rank(self) -> Self:
        if self.dataset.max_bad_rows > 0:
            raise ValueError(
                f"dataset.max_bad_rows: {self.dataset.max_bad_rows}, but supervised runs set no row aside; remove it, "
                "and the bad rows"
            )
        if self.pools.critic is not None:
            raise ValueError(
                "pools.critic: only algorithm.advantage 'gae' of recipes of kind 'grpo' has a critic; remove it"
            )
        if self.batch_size < self.num_teams:
            raise ValueError(
                f"batch_size: {self.batch_size} sequences cannot feed {self.num_teams} policy {self._learners}; "
                "raise batch_size or lower pools.policy.num_workers"
            )
        return self
