"""What a recipe may say about mathematics and decisions; names and defaults are TRL's where the concept is TRL's.

docs/algorithms.md names what has another default; those of the optimizer are GRPOConfig's, whatever is trained.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from algorithms.combinations import refusals
from algorithms.learning_rate import Schedule, refusals_of_arguments, refusals_of_floors

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
STORED = {"stored": True}
"""Context in which a recipe is read that a run has left: what was legal then is no contradiction now."""


class ZeroStdFilter(BaseModel):
    """Leave out groups whose rewards are all equal: their advantages are 0 (DAPO's dynamic sampling)."""

    model_config = CLOSED

    kind: Literal["zero_std"]
    max_filtered_in_a_row: int = Field(10_000, ge=1)
    """More groups than this, one after another without a single one to train on, stop the run."""


class RewardBandFilter(BaseModel):
    """Leave out groups whose mean reward lies outside [min, max]: too hard or too easy to learn from."""

    model_config = CLOSED

    kind: Literal["reward_band"]
    min: float
    max: float
    max_filtered_in_a_row: int = Field(10_000, ge=1)
    """More groups than this, one after another without a single one to train on, stop the run."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"min: {self.min:g} is not below max {self.max:g}; no group would pass, lower min")
        return self


LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo"]
RatioLevel = Literal["token", "sequence", "sequence_product"]
OldLogprobs = Literal["recomputed", "sampled", "interpolated"]

FilterConfig = Annotated[ZeroStdFilter | RewardBandFilter, Field(discriminator="kind")]


class GrpoConfig(BaseModel):
    """Group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300) and its kin, as TRL's trainers compute them.

    docs/algorithms.md says which keys make which method.
    """

    model_config = CLOSED

    num_generations: int = Field(8, ge=1)
    """Rollouts per prompt (the group size G). A baseline of the group needs at least 2."""
    num_iterations: int = Field(1, ge=1)
    """Updates of the policy on each batch; the ratio is measured against the policy before the first."""
    beta: float = Field(0.0, ge=0.0)
    """Weight of the KL penalty against the reference; at 0 there is none."""
    kl_penalty: Literal["k3", "k2", "reward", "reward_to_go", "advantage"] = "k3"
    """Where the KL penalty goes: into the loss (the estimate k3, or k2), or, with the estimate k1, into the reward of
    the whole rollout (with gae, of each token), each token's return, or each token's advantage (on-policy
    distillation)."""
    epsilon: float = Field(0.2, gt=0.0, lt=1.0)
    """Lower clip range of the probability ratio."""
    epsilon_high: float | None = Field(None, gt=0.0)
    """Upper clip range; null takes `epsilon`. DAPO recommends 0.28. With loss_type cispo it is the largest ratio
    itself; ScaleRL recommends 5.0."""
    delta: float | None = Field(None, gt=1.0)
    """Largest ratio that counts where the advantage is negative (dual clip), above 1 + epsilon_high; null for none."""
    entropy_coef: float = Field(0.0, ge=0.0)
    """Weight of the mean entropy, which is added to what is maximised."""
    loss_type: LossType = "dapo"
    """How token losses are averaged: per sequence (grpo), by a constant (dr_grpo), over the tokens of the global
    batch (dapo), over the tokens of each micro-batch (bnpo). cispo averages as dapo, and clips the ratio only."""
    importance_sampling_level: RatioLevel = "token"
    """Whether the probability ratio is of each token, or of the sequence: the mean per token (sequence: GSPO) or the
    product (sequence_product: RLOO)."""
    advantage: Literal["group", "gae"] = "group"
    """Where an advantage comes from: a rollout's reward against a baseline, the same for all its tokens; or, for each
    token, from the values of a critic (gae: PPO), which is the baseline then and needs `pools.critic`."""
    gamma: float = Field(1.0, gt=0.0, le=1.0)
    """Of gae: what the next token's value counts for."""
    lam: float = Field(0.95, ge=0.0, le=1.0)
    """Of gae: 1 trusts what was earned, 0 the values of the critic alone."""
    baseline: Literal["group", "leave_one_out", "none"] = "group"
    """What a rollout's reward is measured against: the mean of its group, of the others of its group (RLOO), or 0."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides the advantages: of the group's rewards, of the batch's, or none (Dr. GRPO)."""
    normalize_advantages: Literal["none", "rollouts", "tokens"] = "none"
    """Subtract the batch's mean from the advantages and divide by their standard deviation, over the batch's rollouts
    (RLOO) or over its tokens (REINFORCE++, PPO)."""
    soft_punish_cache: int | None = Field(None, ge=1)
    """Over the last so many tokens up to max_completion_length the reward falls by 1 (DAPO's overlong punishment)."""
    missing_eos_penalty: float | None = Field(None, gt=0.0)
    """Taken from the reward of a rollout that has not ended before max_completion_length; null takes nothing."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the probability ratio, so that its gradient is the unbiased reverse-KL gradient
    (DeepSeek-V3.2, arXiv 2512.02556)."""
    mask_truncated_completions: bool = False
    """Leave rollouts that hit the length limit out of the loss (DAPO, arXiv 2503.14476)."""
    dynamic_sampling: FilterConfig | None = None
    """Which groups carry no signal: they are left out and others sampled in their place; null trains on every group."""
    old_logprobs: OldLogprobs = "recomputed"
    """Denominator of the clipped ratio: the policy's own log-probabilities when the step begins (corrected by
    importance sampling below), the ones recorded at sampling (the ratio itself is then the correction), or those of one
    version back, interpolated between the two by the token's age (corrected as the first)."""
    vllm_importance_sampling_correction: bool = True
    """Weigh each token by the truncated ratio of the old (as above) to the sampled probability."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """One weight per token or per sequence; weights out of range are clamped (truncate) or zeroed (mask)."""
    vllm_importance_sampling_clip_max: float | None = Field(3.0, gt=0.0)
    """Upper bound of the importance weight; null for none."""
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0.0)
    """Lower bound of the importance weight; null for none."""
    geometric_mask_range: tuple[float, float] | None = None
    """Leave sequences out of the policy term whose mean ratio per token to the sampling weights lies outside, such as
    [0.99, 1.01]; goes with any of the above."""
    off_policy_mask_threshold: float | None = Field(None, gt=0.0)
    """Leave sequences with a negative advantage out of the policy term whose mean KL from the sampling weights exceeds
    this (DeepSeek-V3.2, arXiv 2512.02556); goes with any of the above."""

    @model_validator(mode="after")
    def _sound(self, info: ValidationInfo) -> Self:
        for refusal in refusals(self) if info.context != STORED else ():
            raise ValueError(refusal)
        return self

    @property
    def sums_the_kl(self) -> bool:
        """Whether the KL of whole rollouts is part of what a batch's advantages are made of."""
        to_go = self.kl_penalty == "reward_to_go" and self.normalize_advantages == "tokens"
        return self.kl_penalty == "reward" or to_go

    @property
    def corrects_off_policy(self) -> bool:
        """Whether something stands between stale samples and a biased gradient."""
        return self.old_logprobs == "sampled" or self.vllm_importance_sampling_correction


class AdaptDepthConfig(BaseModel):
    """The depth grows while the samples are nearly on policy and shrinks when they are not; never past the bound."""

    model_config = CLOSED

    ess_low: float = Field(0.5, gt=0.0, lt=1.0)
    """Effective sample size (`sampling/ess`, a fraction of the tokens) under which the depth shrinks."""
    ess_high: float = Field(0.8, gt=0.0, le=1.0)
    """Effective sample size over which the depth grows; between the two it stays."""
    kl_max: float | None = Field(None, gt=0.0)
    """Also shrink when the KL divergence from the reference (`kl`, nats per token) exceeds this; needs beta > 0."""
    smoothing: float = Field(0.7, ge=0.0, lt=1.0)
    """Weight of the past in the running means that are compared with the band."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.ess_low >= self.ess_high:
            raise ValueError(
                f"ess_low: {self.ess_low:g} is not below ess_high {self.ess_high:g}; the band between them is where "
                "the depth stays, lower ess_low"
            )
        return self


class StalenessConfig(BaseModel):
    """How far rollouts may trail the policy; two knobs, because one knob makes every sample sit at the bound."""

    model_config = CLOSED

    max_staleness: int = Field(1, ge=0)
    """Hard bound: no token is trained more than this many weight versions after the weights that sampled it.
    0 is synchronous on-policy training."""
    pipeline_depth: int | None = Field(None, ge=1)
    """Most groups dispatched and not yet trained; null takes groups_per_batch x (max_staleness + 1) x over_sampling,
    the most that the bound allows, and from max_staleness 2 on one batch less with `mask`. Smaller depths give fresher
    samples."""
    when_stale: Literal["pace", "mask", "requeue"] = "pace"
    """What keeps the bound. `pace`: the step waits for the oldest group, and nothing is dropped. `mask`: the step does
    not wait, and tokens beyond the bound leave the loss (needs in_flight_updates, or whole groups would be lost).
    `requeue`: a group that can no longer be trained in time is aborted and its prompt sampled again; long samples are
    then trained less often than they are drawn, which the run warns of."""
    over_sampling: float = Field(1.0, ge=1.0, le=8.0)
    """Dispatch this many times the groups that will be trained, for recipes whose groups are often filtered; those that
    turn out not to be needed are left out as surplus."""
    adapt_depth: AdaptDepthConfig | None = None
    """Let the pipeline depth follow how far off policy the samples are measured to be; null keeps it fixed."""
    in_flight_updates: bool = True
    """Swap weights in the middle of a generation (pause, swap, resume); false lets every generation finish first."""
    kv_cache: Literal["keep", "recompute"] = "keep"
    """What becomes of the running requests' KV cache at an in-flight update."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.when_stale == "mask" and self.max_staleness == 0:
            raise ValueError(
                "when_stale: with max_staleness 0 nothing is ever stale, so there is nothing to mask; set when_stale "
                "to 'pace' or max_staleness to 1 or more"
            )
        if self.when_stale == "mask" and not self.in_flight_updates:
            raise ValueError(
                "when_stale: 'mask' leaves single tokens out of a group that began under older weights; without "
                "in_flight_updates a group has one version, and whole groups would be lost; set in_flight_updates "
                "to true"
            )
        return self


class OptimizerConfig(BaseModel):
    """AdamW with a learning-rate schedule of transformers; names and meanings are TrainingArguments'."""

    model_config = CLOSED

    learning_rate: float = Field(1e-6, gt=0.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.999, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    lr_scheduler_type: Schedule = "constant_with_warmup"
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Arguments of the schedule, such as `{min_lr_rate: 0.1}`; what counts steps counts those of the run."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises; with the schedule `constant` it must be 0."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        schedule, arguments = self.lr_scheduler_type, self.lr_scheduler_kwargs
        if schedule == "constant" and self.warmup_steps:
            raise ValueError(
                "lr_scheduler_type: constant has no warm-up; set it to constant_with_warmup, or warmup_steps to 0"
            )
        for refusal in refusals_of_arguments(schedule, arguments):
            raise ValueError(refusal)
        for refusal in refusals_of_floors(schedule, arguments, self.learning_rate):
            raise ValueError(refusal)
        return self
