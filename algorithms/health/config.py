"""What a recipe may say about the health of its run."""

from pydantic import BaseModel, ConfigDict, Field

CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class HealthConfig(BaseModel):
    """When a run that still computes something is not learning any more."""

    model_config = CLOSED

    max_skipped_in_a_row: int = Field(3, ge=0)
    """Steps in a row whose loss or gradient is not finite; they leave the weights alone, and more of them stop the
    run."""
