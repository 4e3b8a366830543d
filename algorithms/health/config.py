"""What a recipe may say about the health of its run: rules over the metrics of the last steps, and what to do."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from algorithms.config import CLOSED

Action = Literal["warn", "pause", "lower_learning_rate", "roll_back"]


class _Rule(BaseModel):
    model_config = CLOSED

    action: Action = "warn"
    """`warn` says it once. `pause` stops the run with a checkpoint, from which the same command goes on.
    `lower_learning_rate` does so from the next step on, and again when a window later nothing is better. `roll_back`
    goes back to the last checkpoint that was taken while nothing was wrong."""


class ZeroStdRule(_Rule):
    """Nearly all groups have rewards that are all equal: there is nothing to learn from (`frac_reward_zero_std`)."""

    kind: Literal["zero_std"]
    window: int = Field(20, ge=1)
    """Steps over which the mean is taken."""
    max_share: float = Field(0.9, ge=0.0, lt=1.0)
    """Of the groups."""


class OffPolicyRule(_Rule):
    """The samples tell next to nothing of the policy that is trained on them: probability ratios have exploded."""

    kind: Literal["off_policy"]
    window: int = Field(10, ge=1)
    """Steps over which the mean is taken."""
    min_ess: float = Field(0.1, gt=0.0, lt=1.0)
    """Effective sample size (`sampling/ess`, a fraction of the tokens)."""


class KlRule(_Rule):
    """The policy has left the reference far behind (`kl`, which is measured when algorithm.beta is above 0)."""

    kind: Literal["kl"]
    window: int = Field(5, ge=1)
    """Steps over which the mean is taken."""
    max: float = Field(5.0, gt=0.0)
    """Nats per token."""


class EntropyRule(_Rule):
    """The policy always says the same, and explores nothing (`entropy`)."""

    kind: Literal["entropy"]
    window: int = Field(20, ge=1)
    """Steps over which the mean is taken."""
    min: float = Field(0.02, gt=0.0)
    """Nats per token."""


class LengthRule(_Rule):
    """Completions grow longer while the reward stands still: the second half of the window against the first."""

    kind: Literal["length"]
    window: int = Field(50, ge=2)
    """Steps that are compared."""
    max_growth: float = Field(1.5, gt=1.0)
    """Of `completions/mean_length`, as a factor."""
    min_gain: float = 0.0
    """The reward stands still unless its mean grows by more than this."""


class IdleRule(_Rule):
    """A pool has nothing to do for nearly all of the time (`wait/*`)."""

    kind: Literal["idle"]
    pool: Literal["policy", "rollout"]
    window: int = Field(20, ge=1)
    """Steps over which the time is counted."""
    max_share: float = Field(0.95, gt=0.0, lt=1.0)
    """Of the time."""


Rule = Annotated[
    ZeroStdRule | OffPolicyRule | KlRule | EntropyRule | LengthRule | IdleRule, Field(discriminator="kind")
]


class HealthConfig(BaseModel):
    """When a run that still computes something is not learning any more, and what to do then."""

    model_config = CLOSED

    rules: tuple[Rule, ...] = (
        ZeroStdRule(kind="zero_std"),
        OffPolicyRule(kind="off_policy"),
        EntropyRule(kind="entropy"),
        LengthRule(kind="length"),
        IdleRule(kind="idle", pool="policy"),
        IdleRule(kind="idle", pool="rollout"),
    )
    """Each looks at a window of steps; `[]` looks at nothing. What a method does not have is not looked at: probability
    ratios beside `distillation` and `online_dpo`, equal rewards where no group is the baseline, rewards that stand
    still where they are a judge's, and neither where no reward counts."""
    max_skipped_in_a_row: int = Field(3, ge=0)
    """Steps in a row whose loss or gradient is not finite; they leave the weights alone, and more of them stop the
    run."""
    learning_rate_factor: float = Field(0.5, gt=0.0, lt=1.0)
    """What `lower_learning_rate` multiplies the learning rate by, whatever the schedule."""
    max_lowerings: int = Field(3, ge=1)
    """How often it may."""
    max_roll_backs: int = Field(1, ge=0)
    """How often `roll_back` may go back; the run stops instead of going back once more."""
