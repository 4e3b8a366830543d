"""What a recipe may say about publishing weights."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SyncConfig(BaseModel):
    """How a weight version gets from policy rank 0 to every rollout worker."""

    model_config = CLOSED

    transport: Literal["gloo", "nccl"] = "gloo"
    """The wire: gloo over TCP, host memory to host memory; nccl from GPU to GPU, which needs them in both pools and
    has not run on any yet."""
    staging: Literal["device", "host", "none"] = "host"
    """Where a version waits until it is whole while the one before generates: in the workers' device memory, in host
    memory, or nowhere: then generation stands still while a version comes, and it takes two buckets of memory only.
    Every tensor-parallel worker stages the whole model."""
    fanout: Literal["auto"] | int | None = "auto"
    """How gloo reaches many workers. null: one group, in which the policy's machine sends a copy for every doubling
    of their number. A number k: a relay tree, in which policy rank 0 and every worker send at most k copies and pass
    on what has arrived while the rest arrives; 1 is a chain. auto: a relay where it is much faster on paper, one group
    on one machine; `python -m deploy plan` says which. nccl makes one group, and its own way through it."""
    bucket_mb: float = Field(64.0, gt=0.0)
    """Small tensors travel packed in buckets of this size (MiB)."""
    delta: bool = False
    """Send only the elements that changed, bit for bit; pays on a slow wire, costs a host copy of the weights."""
    full_every: int = Field(20, ge=1)
    """With `delta`, versions from one that is sent in full to the next."""
    checksum_every: int = Field(50, ge=0)
    """Versions from one after which vLLM's checksums of all replicas are compared to the next; 0 never compares. The
    engines stand still for it, about a second for each GB (one core computes SHA-256)."""
    timeout_s: float = Field(120.0, gt=0.0)
    """Deadline of each phase of a publication."""

    @field_validator("fanout", mode="before")
    @classmethod
    def _auto_or_a_number(cls, given: Any) -> Any:
        """One error for all that is wrong, where pydantic would have one for each type that it could be."""
        if given is None or given == "auto" or (type(given) is int and given >= 1):
            return given
        raise ValueError("fanout: write auto, null for one group, or the copies that each may send, 1 or more")

    @model_validator(mode="after")
    def _only_gloo_relays(self) -> Self:
        if self.transport == "nccl" and isinstance(self.fanout, int):
            raise ValueError(
                f"fanout: {self.fanout}, but nccl passes its broadcast on from member to member by itself; set "
                "sync.fanout to auto, or sync.transport to gloo"
            )
        return self
