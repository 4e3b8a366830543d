"""What a recipe may say about how long things take; training ignores it.

The defaults are placeholders: roughly a 7B model in bfloat16 on one H100-class GPU for each worker. Calibrate them with
`python -m deploy simulate RECIPE --calibrate RUN_DIR` before a number is relied upon.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from algorithms.config import CLOSED


class LognormalLengths(BaseModel):
    """Completion lengths with a heavy tail, as of reasoning models."""

    model_config = CLOSED

    kind: Literal["lognormal"]
    median: float | None = Field(None, gt=0.0)
    """Median length (tokens); null takes a quarter of generation.max_completion_length."""
    sigma: float = Field(0.8, ge=0.0)
    """Standard deviation of the logarithm: 0 makes all lengths equal, 1 is a heavy tail."""
    max: int | None = Field(None, ge=1)
    """Longer completions are cut here (tokens); null takes generation.max_completion_length, which always cuts."""
    group_correlation: float = Field(0.0, ge=0.0, le=1.0)
    """How much of the variation is the prompt's, shared by its group and by its later attempts."""


class GeometricLengths(BaseModel):
    """Completion lengths of a model that stops after each token with the same probability."""

    model_config = CLOSED

    kind: Literal["geometric"]
    mean: float = Field(gt=1.0)
    """Mean length (tokens), before it is cut."""
    max: int | None = Field(None, ge=1)
    """Longer completions are cut here (tokens); null takes generation.max_completion_length, which always cuts."""
    group_correlation: float = Field(0.0, ge=0.0, le=1.0)
    """How much of the variation is the prompt's, shared by its group and by its later attempts."""


class TraceLengths(BaseModel):
    """Completion lengths of a run that was made: whole groups are drawn from it, so they stay as alike as they were."""

    model_config = CLOSED

    kind: Literal["trace"]
    path: str = Field(min_length=1)
    """A run folder, or its ledger.jsonl."""


LengthsConfig = Annotated[LognormalLengths | GeometricLengths | TraceLengths, Field(discriminator="kind")]


class DecodeConfig(BaseModel):
    """One decoding iteration of a replica gives each of its running sequences one token."""

    model_config = CLOSED

    base_s: float = Field(0.008, ge=0.0)
    """Seconds of an iteration that do not depend on how many sequences run: reading the weights. Placeholder."""
    per_sequence_s: float = Field(5.0e-5, ge=0.0)
    """Seconds more for each running sequence: its arithmetic, and reading its KV cache. Placeholder."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.base_s + self.per_sequence_s == 0.0:
            raise ValueError("base_s: with per_sequence_s 0 too, decoding takes no time; set base_s above 0")
        return self


class TrainConfig(BaseModel):
    """One step of the policy, or what a critic does with a batch."""

    model_config = CLOSED

    per_step_s: float = Field(3.0, ge=0.0)
    """Seconds of a step that do not depend on the batch: the optimizer, communication, packing. Placeholder."""
    per_token_s: float = Field(2.0e-4, ge=0.0)
    """Seconds that one worker needs for a token of the batch, prompts included; the workers share the tokens.
    Placeholder."""


class CriticTimes(BaseModel):
    """A critic (algorithm.advantage 'gae') values a batch before the policy's step, and learns from it beside that."""

    model_config = CLOSED

    values: TrainConfig = TrainConfig(per_step_s=0.5, per_token_s=7.0e-5)
    """Values of a batch's tokens, for which the policy waits. Placeholder."""
    train: TrainConfig = TrainConfig()
    """A step of the critic; the policy takes no further batch before it has ended. Placeholder."""


class RewardLatency(BaseModel):
    """From the last token of a group to its rewards."""

    model_config = CLOSED

    kind: Literal["constant", "exponential"] = "exponential"
    """Always the mean, or spread exponentially around it."""
    mean_s: float = Field(0.2, ge=0.0)
    """Mean seconds. Placeholder."""


class PublishConfig(BaseModel):
    """One weight version on its way from the policy to every replica."""

    model_config = CLOSED

    pause_s: float = Field(0.3, ge=0.0)
    """Seconds at the end that generation stands still for the swap. Placeholder."""
    total_s: float = Field(2.0, ge=0.0)
    """Seconds from the end of a training step until every replica serves its version, the pause included; the policy
    waits meanwhile. Placeholder."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.pause_s > self.total_s:
            raise ValueError(
                f"pause_s: {self.pause_s:g} is part of total_s, which is only {self.total_s:g}; raise total_s"
            )
        return self


class FailuresConfig(BaseModel):
    """Replicas that die: their groups are dispatched again, from the first token."""

    model_config = CLOSED

    mean_between_s: float | None = Field(None, gt=0.0)
    """Mean seconds of one replica's life, spread exponentially; null for ever."""
    recovery_s: float = Field(120.0, ge=0.0)
    """Seconds until a dead replica serves again. Placeholder."""


class SimulationConfig(BaseModel):
    """How long things take, for `python -m deploy simulate`; training ignores it."""

    model_config = CLOSED

    lengths: LengthsConfig = LognormalLengths(kind="lognormal")
    decode: DecodeConfig = DecodeConfig()
    train: TrainConfig = TrainConfig()
    critic: CriticTimes = CriticTimes()
    """Of recipes with a critic alone."""
    reward: RewardLatency = RewardLatency()
    sync: PublishConfig = PublishConfig()
    failures: FailuresConfig = FailuresConfig()
    filtered_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the groups that carry no signal and are left out after scoring (algorithm.dynamic_sampling)."""
    prompt_length: int = Field(256, ge=0)
    """Tokens of a prompt, which are trained on with each of its completions. Placeholder."""
    seed: int = Field(0, ge=0)
