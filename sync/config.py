"""What a recipe may say about publishing weights."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SyncConfig(BaseModel):
    """One broadcast group from policy rank 0 to every rollout worker."""

    model_config = CLOSED

    transport: Literal["gloo"] = "gloo"
    """The wire: gloo over TCP, from host memory to host memory. (sync/nccl.py is written, and no run uses it yet.)"""
    bucket_mb: float = Field(64.0, gt=0.0)
    """Small tensors travel packed in buckets of this size (MiB)."""
    delta: bool = False
    """Send only the elements that changed, bit for bit; pays on a slow wire, costs a host copy of the weights."""
    full_every: int = Field(20, ge=1)
    """With `delta`, versions from one that is sent in full to the next."""
    timeout_s: float = Field(120.0, gt=0.0)
    """Deadline of each phase of a publication."""
