"""What scores completions, and what becomes of a score that fails."""

from typing import Self

from pydantic import BaseModel, Field, model_validator

from actors.recipe.closed import CLOSED
from actors.rewards.functions import CLASSIFIER, JUDGE

LOAD_TIMEOUT_S = 120.0
"""Deadline for a process to load all reward functions; it is not part of a call's deadline. After a call that had to be
killed, they are loaded again before the next one."""
CANCEL_GRACE_S = 3.0
"""Beyond a call's deadline, for the process to say that it has cut the call off; then it is killed."""


class RewardConfig(BaseModel):
    """One reward function, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, or one model."""

    model_config = CLOSED

    function: str | None = Field(None, min_length=1)
    """`path/to/file.py:name` or `package.module:name`; sync or async."""
    model: str | None = Field(None, min_length=1)
    """A reward model in place of a function: the folder or hub name of a sequence classifier with one label, such as
    the `runs/<name>/model` that a recipe of kind `reward` leaves."""
    judge: str | None = Field(None, min_length=1)
    """A function that compares two completions, in place of one that scores each: `judge(prompts, pairs) -> list[int |
    None]`, the place of the better one in each pair; it needs num_generations 2. The better one has the reward 1."""
    weight: float = 1.0
    """Of its scores in the reward, which is their sum; with 0 they are only measured."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if [self.function, self.model, self.judge].count(None) != 2:
            raise ValueError(
                "write either function: 'path/to/file.py:name' or model: path/to/a/reward/model or judge: "
                "'path/to/file.py:name'"
            )
        return self

    @property
    def source(self) -> str:
        """What the process that scores is told to load."""
        if self.judge is not None:
            return f"{JUDGE}{self.judge}"
        return self.function or f"{CLASSIFIER}{self.model}"


class RewardsConfig(BaseModel):
    """The reward functions and the deadline that each call has."""

    model_config = CLOSED

    functions: tuple[RewardConfig, ...] = Field(min_length=1)
    timeout_s: float = Field(30.0, gt=0.0)
    """A call that takes longer is cut off or killed; its completions are unscorable, never 0."""
    max_concurrent_groups: int = Field(32, ge=1, le=512)
    """Groups whose async functions and judges one reward worker calls at one time, all in one process and event loop;
    1 calls them one after another. Sync functions and models are called for one group at a time, whatever it says."""
    max_memory_gb: float | None = Field(None, gt=0.0)
    """Most memory of its own (heap, arrays, stacks; in 10^9 bytes) that a process of reward functions may take, and
    each that it starts; a call that wants more raises MemoryError and is unscorable, cause `memory`. null: no limit.
    Each reward worker has one such process, or two where functions are both sync and async; a model in host memory
    counts with its weights."""
    max_failed_share: float = Field(0.1, ge=0.0, le=1.0)
    """A run stops when calls failed in more than this share of its last 100 groups; 1.0 tolerates every failure."""
