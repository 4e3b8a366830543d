"""What the two sides of `benchmarks.end_to_end` are given, and what they give back: the same for both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from benchmarks import end_to_end_rewards

REWARDS = Path(end_to_end_rewards.__file__)
TrlMode = Literal["generate", "continuous batching"]
TRL_MODES: tuple[TrlMode, ...] = get_args(TrlMode)


class Case(BaseModel):
    """One load; whatever decides how much work it is, is here once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    model: str
    """Folder in Hugging Face layout."""
    data: str
    """JSON lines with a column `prompt`."""
    reward: Literal["lower_case", "lower_case_slowly"] = "lower_case"
    max_completion_length: int
    num_generations: int = 8
    groups_per_batch: int = 32
    learning_rate: float = 1e-8
    """So small that lengths stay what they are: at 1e-6 they grow by half within twenty steps, and TRL's side takes the
    first four alone."""
    seed: int = 0
    num_steps: int
    num_warm_up_steps: int
    """Steps before the clock starts."""
    trl_steps: int
    trl_warm_up_steps: int | None = None
    """As many as ours when it is null; fewer where its steps take long, for it has nothing to fill."""
    trl_mode: TrlMode = "generate"
    trl_micro_batch: int = 64
    """Sequences of one forward pass: where TRL is fastest."""
    trl_threads: int = 2
    max_staleness: int = 1
    max_num_seqs: int = 256
    """Completions that the replica decodes at once."""
    max_groups_per_replica: int | None = None
    """Groups that it holds, decoding or queued; null is the recipes' default, four times as many as it decodes."""
    engine_threads: int = 1
    policy_threads: int = 2
    max_concurrent_groups: int = 32
    """Whose rewards the one reward worker asks for at one time, when they are async: the recipes' default, or more."""

    @property
    def num_rollouts(self) -> int:
        return self.groups_per_batch * self.num_generations


class Measured(BaseModel):
    """What a side did after its warm-up."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    samples_per_s: float
    step_s: float
    num_steps: int
    """That were counted."""
    mean_length: float
    """Of completions, in tokens, over the steps that were counted."""
    max_length: float
    rewards: list[float]
    """Of every step, those of the warm-up too."""
    notes: dict[str, float] = {}


def reward_function(name: str) -> Callable[..., Any]:
    """The very function that the other side's recipe names by file."""
    return {
        "lower_case": end_to_end_rewards.lower_case,
        "lower_case_slowly": end_to_end_rewards.lower_case_slowly,
    }[name]
