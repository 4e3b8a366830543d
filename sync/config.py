"""What a recipe may say about publishing weights."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SyncConfig(BaseModel):
    """One broadcast group from policy rank 0 to every rollout worker."""

    model_config = CLOSED

    transport: Literal["gloo"] = "gloo"
    """The wire: gloo over TCP, from host memory to host memory. (sync/nccl.py is written, and no run uses it yet.)"""
    fanout: Literal["auto"] | int | None = "auto"
    """How the wire reaches many workers. null: one group, in which the policy's machine sends a copy for every doubling
    of their number. A number k: a relay tree, in which policy rank 0 and every worker send at most k copies and pass
    on what has arrived while the rest arrives; 1 is a chain. auto: a relay where it is much faster on paper, one group
    on one machine; `python -m deploy plan` says which."""
    bucket_mb: float = Field(64.0, gt=0.0)
    """Small tensors travel packed in buckets of this size (MiB)."""
    delta: bool = False
    """Send only the elements that changed, bit for bit; pays on a slow wire, costs a host copy of the weights."""
    full_every: int = Field(20, ge=1)
    """With `delta`, versions from one that is sent in full to the next."""
    timeout_s: float = Field(120.0, gt=0.0)
    """Deadline of each phase of a publication."""

    @field_validator("fanout", mode="before")
    @classmethod
    def _auto_or_a_number(cls, given: Any) -> Any:
        """One error for all that is wrong, where pydantic would have one for each type that it could be."""
        if given is None or given == "auto" or (type(given) is int and given >= 1):
            return given
        raise ValueError("fanout: write auto, null for one group, or the copies that each may send, 1 or more")
