"""What a recipe may say about hardware: one pool per role, each a number of equal workers on whole GPUs."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PoolConfig(BaseModel):
    """Workers of one role; each worker is one bundle and never spans nodes."""

    model_config = CLOSED

    num_workers: int = Field(1, ge=1)
    """Policy or critic ranks, rollout replicas, reference or reward workers."""
    gpus_per_worker: int = Field(0, ge=0)
    """Whole GPUs of each worker; 0 runs the worker on the CPU. For rollouts it is the tensor-parallel size."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """Logical CPUs that the worker reserves."""
    strategy: Literal["pack", "spread"] = "pack"
    """Fill one node before the next, or spread the workers over the nodes."""
    node_resource: str | None = None
    """Only nodes that offer this custom Ray resource may hold the pool (each worker takes 0.001 of it)."""


class PoolsConfig(BaseModel):
    """One pool per role; a pool whose role the recipe does not use is not placed."""

    model_config = CLOSED

    policy: PoolConfig = PoolConfig()
    reference: PoolConfig = PoolConfig()
    critic: PoolConfig | None = None
    """For algorithm.advantage 'gae' alone, which needs it."""
    reward: PoolConfig = PoolConfig()
    rollout: PoolConfig = PoolConfig()
