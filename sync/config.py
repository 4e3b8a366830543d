"""What a recipe may say about publishing weights."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SyncConfig(BaseModel):
    """One broadcast group from policy rank 0 to every rollout worker."""

    model_config = CLOSED

    transport: Literal["gloo", "nccl"] = "gloo"
    """The wire: gloo over TCP, host memory to host memory; nccl from GPU to GPU, which needs them in both pools and
    has not run on any yet."""
    staging: Literal["device", "host", "none"] = "host"
    """Where a version waits until it is whole while the one before generates: in the workers' device memory, in host
    memory, or nowhere: then generation stands still while a version comes, and it takes two buckets of memory only.
    Every tensor-parallel worker stages the whole model."""
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
