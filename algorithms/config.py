"""What a recipe may say about mathematics and decisions; names and defaults are TRL's where the concept is TRL's."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class GrpoConfig(BaseModel):
    """Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), as TRL's GRPOTrainer computes it."""

    model_config = CLOSED

    num_generations: int = 8
    """Rollouts per prompt (the group size G). The baseline is the group's mean, so at least 2 are needed."""
    beta: float = Field(0.0, ge=0.0)
    """Weight of the KL penalty against the reference; at 0 no reference worker is started."""
    epsilon: float = Field(0.2, gt=0.0, lt=1.0)
    """Lower clip range of the probability ratio."""
    epsilon_high: float | None = Field(None, gt=0.0)
    """Upper clip range; null takes `epsilon`. DAPO recommends 0.28."""
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    """How token losses are averaged: per sequence (grpo), by a constant (dr_grpo), over the tokens of the global
    batch (dapo), over the tokens of each micro-batch (bnpo)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides the advantages: of the group, of the batch, or none (Dr. GRPO)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the probability ratio, so that its gradient is the unbiased reverse-KL gradient
    (DeepSeek-V3.2, arXiv 2512.02556)."""
    mask_truncated_completions: bool = False
    """Leave rollouts that hit the length limit out of the loss (DAPO, arXiv 2503.14476)."""
    old_logprobs: Literal["recomputed", "sampled"] = "recomputed"
    """Denominator of the clipped ratio: the policy's own log-probabilities when the step begins (corrected by
    importance sampling below), or the ones recorded at sampling (the ratio itself is then the correction)."""
    vllm_importance_sampling_correction: bool = True
    """Weigh each token by the truncated ratio of the recomputed to the sampled probability."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """One weight per token or per sequence; weights out of range are clamped (truncate) or zeroed (mask)."""
    vllm_importance_sampling_clip_max: float | None = Field(3.0, gt=0.0)
    """Upper bound of the importance weight; null for none."""
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0.0)
    """Lower bound of the importance weight; null for none."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.num_generations < 2:
            raise ValueError(
                "num_generations: the advantage is measured against the group's mean, which needs at least 2 rollouts "
                f"a prompt, got {self.num_generations}; set num_generations to 2 or more"
            )
        if self.old_logprobs == "sampled" and self.vllm_importance_sampling_correction:
            raise ValueError(
                "old_logprobs: 'sampled' already corrects for the sampling weights, so the importance weights would be "
                "applied twice; set vllm_importance_sampling_correction to false"
            )
        return self

    @property
    def corrects_off_policy(self) -> bool:
        """Whether something stands between stale samples and a biased gradient."""
        return self.old_logprobs == "sampled" or self.vllm_importance_sampling_correction


class StalenessConfig(BaseModel):
    """How far rollouts may trail the policy; two knobs, because one knob makes every sample sit at the bound."""

    model_config = CLOSED

    max_staleness: int = Field(1, ge=0)
    """Hard bound: no token is trained more than this many weight versions after the weights that sampled it.
    0 is synchronous on-policy training."""
    pipeline_depth: int | None = Field(None, ge=1)
    """Most groups dispatched and not yet trained; null takes groups_per_batch x (max_staleness + 1), the most that
    the bound allows. Smaller depths give fresher samples."""
    when_stale: Literal["pace"] = "pace"
    """What keeps the bound: `pace` makes the step wait for the oldest group, and nothing is dropped."""
    in_flight_updates: bool = True
    """Swap weights in the middle of a generation (pause, swap, resume); false lets every generation finish first."""
    kv_cache: Literal["keep", "recompute"] = "keep"
    """What becomes of the running requests' KV cache at an in-flight update."""


class OptimizerConfig(BaseModel):
    """AdamW with a learning-rate schedule of transformers; names and meanings are TrainingArguments'."""

    model_config = CLOSED

    learning_rate: float = Field(1e-6, gt=0.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = Field(0, ge=0)
