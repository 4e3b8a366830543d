"""The model in training, and which of its weights move."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from actors.recipe.closed import CLOSED


class LoraConfig(BaseModel):
    """Adapters on linear layers are trained and published, and the model below them never moves; names are peft's."""

    model_config = CLOSED

    r: int = Field(16, ge=1, le=512)
    """Rank of the adapters."""
    lora_alpha: int = Field(32, ge=1)
    """What an adapter adds is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that training leaves out; for supervised recipes."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear`, which leaves out the output head alone, or names of linear layers such as `[q_proj, v_proj]`."""

    quantize: Literal["nf4"] | None = None
    """Hold the model below the adapter in four bits (QLoRA, by bitsandbytes); null holds it in `dtype`. The rollout
    replicas serve the adapter over the whole model, so that they differ from the policy a little."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, given: Any) -> Any:
        if given == "all-linear":
            return given
        if not (isinstance(given, list | tuple) and given and all(isinstance(name, str) and name for name in given)):
            raise ValueError(
                "target_modules: write all-linear, or a list with the names of one or more linear layers, such as "
                "[q_proj, v_proj]"
            )
        return tuple(given)


class OffloadConfig(BaseModel):
    """What a rank keeps in its host's memory instead of the GPU's (ZeRO-Offload, arXiv 2101.06840)."""

    model_config = CLOSED

    optimizer: Literal["cpu"] = "cpu"
    """AdamW's state and the float32 weights, and its step is computed there."""
    parameters: Literal["cpu"] | None = None
    """With ZeRO-3, the weights as well, which are on the GPU while a layer needs them (ZeRO-Infinity, arXiv
    2104.07857); null leaves each rank's share there."""


class PolicyConfig(BaseModel):
    """The model in training: one DeepSpeed rank per worker of the policy pool."""

    model_config = CLOSED

    zero_stage: int = Field(1, ge=0, le=3)
    """DeepSpeed ZeRO: 0 replicates everything (float32 only), 1 shards the optimizer, 2 the gradients, too, 3 also the
    weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens_per_micro_batch: int = Field(8192, ge=16)
    """Token budget of one forward pass, of a rank or of a team of ranks."""
    sequence_parallel_size: int = Field(1, ge=1)
    """Ranks that compute each forward pass together, as a team: each has its share of the tokens, and in attention of
    the heads (Ulysses, arXiv 2309.14509). For sequences whose activations are too many for one GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
    """Train and publish adapters only; null trains and publishes every weight."""
    offload: OffloadConfig | None = None
    """Keep the optimizer in the host's memory, such as `{optimizer: cpu}`, or the weights, too, `{parameters: cpu}`;
    null keeps both on the GPU."""
    liger: bool | Literal["auto"] = "auto"
    """On GPUs, compute norms, rotary embeddings and gated MLPs with liger-kernel's fused kernels; auto does where the
    package is installed and the model is of a type that was tried."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of each rank; null takes the pool's cpus_per_worker, at least 1."""
    timeout_s: float = Field(1800.0, gt=0.0)
    """Deadline of one step."""
    max_restarts: int = Field(3, ge=0)
    """When a rank dies or hangs, all ranks are built again and go on from the last checkpoint, and the replicas keep
    their engines; one more time than this in a process stops the run."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        check_stage("policy", self.zero_stage, self.dtype)
        if self.offload is not None and self.zero_stage == 0:
            raise ValueError("offload: without ZeRO nothing is kept apart; set zero_stage to 1 or more")
        if self.offload is not None and self.offload.parameters is not None and self.zero_stage != 3:
            raise ValueError(
                f"offload.parameters: only ZeRO-3 fetches weights when they are needed, and zero_stage is "
                f"{self.zero_stage}; set zero_stage to 3, or offload.parameters to null"
            )
        if self.lora is None or self.lora.quantize is None:
            return self
        if self.dtype != "bfloat16":
            raise ValueError(
                f"lora.quantize: {self.lora.quantize} is computed in bfloat16, and dtype is {self.dtype}; set dtype to "
                "bfloat16"
            )
        if self.zero_stage == 3:
            raise ValueError(
                "lora.quantize: ZeRO-3 would shard weights of four bits, which has not been tried; set zero_stage to 2"
            )
        return self


def check_stage(section: str, zero_stage: int, dtype: str) -> None:
    """ValueError when DeepSpeed cannot hold such weights in this way."""
    if zero_stage == 0 and dtype == "bfloat16":
        raise ValueError(
            "zero_stage: DeepSpeed has no stage 0 for bfloat16 weights whose gradients are summed in float32; set "
            f"{section}.zero_stage to 1, which with one rank takes as much memory, and with more of them less"
        )
