"""What a recipe may say about checkpoints."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from actors.recipe.closed import CLOSED


class BestConfig(BaseModel):
    """By which of its metrics a run tells its best checkpoint."""

    model_config = CLOSED

    metric: str = Field("reward", min_length=1)
    """A name in `metrics.jsonl`; the mean over the steps since the checkpoint before counts."""
    mode: Literal["max", "min"] = "max"
    """Whether the highest value is the best, or the lowest."""


class CheckpointConfig(BaseModel):
    """Checkpoints from which a run goes on when its command is given again, after whatever ended it."""

    model_config = CLOSED

    every: int = Field(50, ge=0)
    """Steps from one to the next; 0 makes none but on SIGTERM."""
    keep: int = Field(2, ge=2)
    """The newest so many are kept, two at least: where the newest turns out to be damaged, the run goes on from the one
    before. Each holds the float32 weights and AdamW's two moments, 12 bytes a parameter."""
    best: BestConfig | None = None
    """Keep the best one besides, as `{metric: reward, mode: max}`; null keeps the newest alone."""
    timeout_s: float = Field(1800.0, gt=0.0)
    """Deadline of writing one, which goes on while training does."""

    @model_validator(mode="after")
    def _has_a_choice(self) -> Self:
        if self.best is not None and self.every == 0:
            raise ValueError(
                "best: there is no best checkpoint when every is 0, which makes none; set every to 1 or more"
            )
        return self
