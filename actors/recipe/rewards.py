"""What scores completions, and what becomes of a score that fails."""

from pydantic import BaseModel, Field

from actors.recipe.closed import CLOSED


class RewardConfig(BaseModel):
    """One reward function: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`."""

    model_config = CLOSED

    function: str = Field(min_length=1)
    """`path/to/file.py:name` or `package.module:name`; sync or async."""
    weight: float = 1.0


class RewardsConfig(BaseModel):
    """The reward functions and the deadline that each call has."""

    model_config = CLOSED

    functions: tuple[RewardConfig, ...] = Field(min_length=1)
    timeout_s: float = Field(30.0, gt=0.0)
    """A call that takes longer is killed; its completions are unscorable, never 0."""
    max_failed_share: float = Field(0.1, ge=0.0, le=1.0)
    """A run stops when calls failed in more than this share of its last 100 groups; 1.0 tolerates every failure."""
