"""What a recipe may say about hardware: one pool per role, each a number of equal workers on whole GPUs."""

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

# As Ray and Kubernetes take labels: a key may have a domain in front, such as ray.io/accelerator-type.
_VALUE = r"[a-zA-Z0-9]([-a-zA-Z0-9_.]{0,61}[a-zA-Z0-9])?"
_LABEL = re.compile(rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_VALUE}={_VALUE}")


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
    node_labels: dict[str, str] = {}
    """Only nodes that bear all these labels may hold the pool (`ray start --labels KEY=VALUE`)."""

    @field_validator("node_labels", mode="before")
    @classmethod
    def _are_labels(cls, labels: Any) -> Any:
        for key, value in labels.items() if isinstance(labels, dict) else ():
            if not isinstance(key, str) or not isinstance(value, str):
                raise ValueError(f"label {key}: {value!r} is not text; write it in quotes")
            if not _LABEL.fullmatch(f"{key}={value}"):
                raise ValueError(
                    f"label {key}: {value!r} is none that Ray takes; write letters and digits, with dashes, dots and "
                    "underscores between them, 63 at most"
                )
        return labels


class RolloutPoolConfig(PoolConfig):
    """Replicas may come and go while a run trains, between two numbers; the run begins with `num_workers`, or with as
    many as the cluster has room for, and at least `min_workers`."""

    min_workers: int | None = Field(None, ge=1)
    """Fewest replicas that a run goes on with; null takes num_workers."""
    max_workers: int | None = Field(None, ge=1)
    """Most replicas (`python -m deploy scale`); null takes num_workers."""

    @property
    def least(self) -> int:
        return self.min_workers or self.num_workers

    @property
    def most(self) -> int:
        return self.max_workers or self.num_workers

    @property
    def elastic(self) -> bool:
        """Whether the number of replicas may change in a run."""
        return self.least < self.most

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.min_workers is not None and self.num_workers < self.min_workers:
            raise ValueError(
                f"num_workers: {self.num_workers} is less than min_workers={self.min_workers}; raise it, or lower "
                "min_workers"
            )
        if self.max_workers is not None and self.num_workers > self.max_workers:
            raise ValueError(
                f"num_workers: {self.num_workers} is more than max_workers={self.max_workers}; lower it, or raise "
                "max_workers"
            )
        if self.elastic and self.strategy == "spread":
            raise ValueError(
                "strategy: replicas that come and go are placed one by one, which 'spread' does not reach; leave it "
                "out, or min_workers and max_workers"
            )
        return self


class PoolsConfig(BaseModel):
    """One pool per role; a pool whose role the recipe does not use is not placed."""

    model_config = CLOSED

    policy: PoolConfig = PoolConfig()
    reference: PoolConfig = PoolConfig()
    critic: PoolConfig | None = None
    """For algorithm.advantage 'gae' alone, which needs it."""
    reward: PoolConfig = PoolConfig()
    rollout: RolloutPoolConfig = RolloutPoolConfig()
