"""What a recipe may say about hardware: one pool per role, each a number of equal workers on whole GPUs."""

import re
from collections.abc import Iterator, Mapping
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
    colocate_with: str | None = None
    """`policy`: the workers take no GPUs of their own and lie on those of the policy's ranks, in order; one with
    gpus_per_worker=2 lies on two neighbouring ranks. Rollout replicas stand still, and their engines sleep, while the
    policy computes; other workers share the memory of their GPU. Without GPUs the pools share CPUs in time."""

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

    @model_validator(mode="after")
    def _shares_soundly(self) -> Self:
        pools = {name: getattr(self, name) for name in type(self).model_fields}
        for refusal in sharing_refusals({name: pool for name, pool in pools.items() if pool is not None}):
            raise ValueError(refusal)
        return self


HOST = "policy"
"""The pool whose GPUs others may lie on."""


def hosts_per_worker(pool: PoolConfig, host: PoolConfig) -> int:
    """On so many neighbouring workers of the host does one worker of the pool lie; without GPUs on one."""
    return max(1, pool.gpus_per_worker // max(1, host.gpus_per_worker))


def hosts_of(worker: int, pool: PoolConfig, host: PoolConfig) -> tuple[int, ...]:
    """With which workers of the host a worker of the pool lies; those without GPUs are dealt out in turn."""
    each = hosts_per_worker(pool, host)
    return tuple(place % host.num_workers for place in range(worker * each, (worker + 1) * each))


def sharing_refusals(pools: Mapping[str, PoolConfig]) -> Iterator[str]:
    """Why a pool cannot lie where it is told to, with what to set."""
    for name, pool in pools.items():
        if pool.colocate_with is not None:
            yield from _refusals(name, pool, pools)


def _refusals(name: str, pool: PoolConfig, pools: Mapping[str, PoolConfig]) -> Iterator[str]:
    key = f"{name}.colocate_with"
    if name == HOST:
        yield f"{key}: the policy's GPUs are those that others share; leave it out, and name policy in the other pool"
        return
    if pool.colocate_with != HOST:
        known = "" if pool.colocate_with in pools else f"there is no pool {pool.colocate_with!r}, and "
        yield f"{key}: {known}only the policy's GPUs can be shared; set pools.{key} to policy, or leave it out"
        return
    host = pools[HOST]
    if isinstance(pool, RolloutPoolConfig) and pool.elastic:
        yield (
            f"{key}: replicas that come and go need places of their own; leave it out, or min_workers and max_workers"
        )
    for setting, usual in (("node_resource", None), ("node_labels", {}), ("strategy", "pack")):
        if getattr(pool, setting) != usual:
            yield f"{name}.{setting}: its workers lie where the policy's do; set pools.{HOST}.{setting} instead"
    if host.gpus_per_worker and not pool.gpus_per_worker:
        yield (
            f"{name}.gpus_per_worker: 0, but the policy's workers have GPUs for it to share; set "
            f"pools.{name}.gpus_per_worker to 1 or more, or leave colocate_with out"
        )
    elif pool.gpus_per_worker and not host.gpus_per_worker:
        yield (
            f"{name}.gpus_per_worker: {pool.gpus_per_worker}, but the policy's workers have no GPUs to share; set "
            f"pools.{HOST}.gpus_per_worker to 1, or pools.{name}.gpus_per_worker to 0"
        )
    if not host.gpus_per_worker:
        return
    each = hosts_per_worker(pool, host)
    if pool.gpus_per_worker % host.gpus_per_worker or host.num_workers % each:
        yield (
            f"{name}.gpus_per_worker: {pool.gpus_per_worker} does not divide the policy's "
            f"{host.num_workers} x {host.gpus_per_worker} GPUs evenly; set pools.{HOST}.num_workers to a multiple of "
            f"{each}, or pools.{name}.gpus_per_worker to {max(1, host.gpus_per_worker)}"
        )
    elif pool.num_workers * each > host.num_workers:
        yield (
            f"{name}.num_workers: {pool.num_workers} workers on {each} of the policy's each need "
            f"{pool.num_workers * each}, and there are {host.num_workers}; set pools.{name}.num_workers to "
            f"{host.num_workers // each}, or raise pools.{HOST}.num_workers"
        )
