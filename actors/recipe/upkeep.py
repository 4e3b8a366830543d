"""How a run is watched while it goes, and what it leaves for those who look."""

from typing import Literal

from pydantic import BaseModel, Field

from actors.recipe.closed import CLOSED


class LivenessConfig(BaseModel):
    """Every worker is asked for a sign of life now and then; one that gives none is taken for dead."""

    model_config = CLOSED

    every_s: float = Field(10.0, gt=0.0)
    """Seconds from one question to the next."""
    timeout_s: float = Field(60.0, ge=1.0)
    """Longest wait for an answer. An engine answers between two of its steps, so this is longer than any of them."""
    max_restarts: int = Field(10, ge=0)
    """How often each reward and each reference worker is started again; one more death stops the run."""


class StallConfig(BaseModel):
    """What to do when no group finishes while the policy waits."""

    model_config = CLOSED

    timeout_s: float | None = Field(None, gt=0.0)
    """For so long; null takes what one group alone may take by its own deadlines (`python -m deploy plan` tells)."""
    then: Literal["exit", "retry"] = "exit"
    """`exit` leaves a checkpoint and ends the run with a sentence that names the suspect; `retry` replaces the suspect,
    as often as `rollout.max_rebuilds` and `liveness.max_restarts` allow, and goes on (unless it is the policy)."""


class LoggingConfig(BaseModel):
    """What the run folder keeps besides the metrics."""

    model_config = CLOSED

    completions_every: int = Field(10, ge=1)
    """Steps between two samples of completions."""
    num_completions: int = Field(8, ge=0)
    """Completions in each sample."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; the key comes from the environment (WANDB_API_KEY, WANDB_MODE)."""
