"""The critic of PPO: a second model in training, which says before each token what is still to be earned."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from actors.recipe.closed import CLOSED
from actors.recipe.model import PretrainedModel
from actors.recipe.policy import PolicyConfig, check_stage
from algorithms.config import OptimizerConfig
from algorithms.learning_rate import refusals_of_floors


class CriticConfig(BaseModel):
    """One DeepSpeed rank per worker of the critic pool; what is not said here is as the policy's is."""

    model_config = CLOSED

    model: PretrainedModel | None = None
    """What the critic begins with, with the policy's tokenizer; null takes the policy's initial weights. A model that
    has no head for one score gets a new one."""
    learning_rate: float = Field(1e-5, gt=0.0)
    """The optimizer's other keys hold for the critic, too."""
    cliprange_value: float = Field(0.2, gt=0.0)
    """How far a step may move a value and still gain by it."""
    warmup_steps: int = Field(0, ge=0)
    """For so many steps the critic learns alone, and the policy stays as it is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    zero_stage: int = Field(1, ge=0, le=3)
    sequence_parallel_size: int = Field(1, ge=1)
    """As the policy's."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        check_stage("critic", self.zero_stage, self.dtype)
        return self

    def ranks_like(self, policy: PolicyConfig) -> PolicyConfig:
        """How the critic's ranks compute."""
        own = {name: getattr(self, name) for name in ("dtype", "zero_stage", "sequence_parallel_size")}
        return policy.model_copy(update=own | {"lora": None})

    def optimizer_like(self, policy: OptimizerConfig) -> OptimizerConfig:
        """What the critic's ranks learn with; ValueError when the schedule cannot begin at the critic's rate."""
        for refusal in refusals_of_floors(policy.lr_scheduler_type, policy.lr_scheduler_kwargs, self.learning_rate):
            raise ValueError(f"optimizer.{refusal}, or raise critic.learning_rate, for which the schedule holds, too")
        return policy.model_copy(update={"learning_rate": self.learning_rate})
