"""How groups are sampled, and by which engines."""

from typing import Literal

from pydantic import BaseModel, Field

from actors.recipe.closed import CLOSED


class GenerationConfig(BaseModel):
    """How rollouts are sampled; names are TRL's."""

    model_config = CLOSED

    max_completion_length: int = Field(256, ge=1)
    """Longest completion (tokens)."""
    max_prompt_length: int = Field(512, ge=1)
    """Longest prompt (tokens); a longer one is an error that names the row."""
    temperature: float = Field(1.0, gt=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    """0 keeps every token."""
    timeout_s: float = Field(600.0, gt=0.0)
    """Deadline of one group's generation."""


class RolloutConfig(BaseModel):
    """The inference engines: one vLLM AsyncLLM per worker of the rollout pool."""

    model_config = CLOSED

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_num_seqs: int = Field(128, ge=1)
    """Sequences that one replica decodes at once."""
    max_groups_per_replica: int | None = Field(None, ge=1)
    """Most groups that one replica holds, decoding or queued; null takes 4 x max_num_seqs / num_generations, so that
    its slots stay full although most rollouts of a group end before its longest. More would only grow stale there."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """Share of each GPU's memory that an engine takes: weights, buffers and KV cache together."""
    cpu_kv_cache_gb: int = Field(1, ge=1)
    """KV cache of a replica on the CPU (GiB)."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs; null is true on the CPU and false on GPUs."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of each replica; null lets vLLM choose."""
    start_timeout_s: float = Field(600.0, gt=0.0)
    """Deadline of an engine's start."""
    max_attempts: int = Field(3, ge=1)
    """A group whose generation fails this often is quarantined; on two replicas at the least, where two serve."""
    max_rebuilds: int = Field(10, ge=0)
    """Replicas that fail are rebuilt while the others go on; more failures than this stop the run."""
    leave_grace_s: float = Field(30.0, ge=0.0)
    """A replica that is to leave (`pools.rollout.min_workers`) may finish its groups for so long; the others go on
    elsewhere with the tokens that they have."""
    capacity_timeout_s: float = Field(1800.0, gt=0.0)
    """Longest wait for machines while fewer than `pools.rollout.min_workers` replicas have a place."""
    max_quarantined: int = Field(0, ge=0)
    """More quarantined groups than this stop the run."""
