"""What a recipe may say about checkpoints."""

from pydantic import BaseModel, ConfigDict, Field


class CheckpointConfig(BaseModel):
    """Cuts from which a run goes on when its command is given again, after whatever ended it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    every: int = Field(50, ge=0)
    """Steps from one cut to the next; 0 makes none but on SIGTERM."""
    keep: int = Field(2, ge=1)
    """The newest so many are kept; each holds the float32 weights and AdamW's two moments, 12 bytes a parameter."""
    timeout_s: float = Field(1800.0, gt=0.0)
    """Deadline of writing one, which goes on while training does."""
