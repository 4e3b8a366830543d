"""Runs that learn from what somebody preferred; `algorithm` bears the names of TRL's trainer of the same kind."""

from typing import Literal, Self

from pydantic import model_validator

from actors.recipe.base import OfflineRecipe
from algorithms.preference.config import (
    BradleyTerryConfig,
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PreferenceConfig,
)


class PreferenceRecipe(OfflineRecipe):
    """What they have in common; `chosen`, `rejected` and, unless both begin with it, `prompt` are their columns."""

    algorithm: PreferenceConfig

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        lora = self.policy.lora
        if lora is not None and lora.lora_dropout > 0:
            raise ValueError(
                f"policy.lora.lora_dropout: {lora.lora_dropout} would add noise to the log-probabilities that are "
                "compared; set it to 0 (recipes of kind 'sft' may have it)"
            )
        return self

    @property
    def reference_below(self) -> bool:
        """The reference is the policy without its adapter."""
        return self.policy.lora is not None and isinstance(self.algorithm, DpoConfig | KtoConfig)


class DpoRecipe(PreferenceRecipe):
    """Direct preference optimisation: pairs of answers, against the policy as it was before the first step."""

    kind: Literal["dpo"]
    algorithm: DpoConfig = DpoConfig()


class KtoRecipe(PreferenceRecipe):
    """Kahneman-Tversky optimisation: completions with a `label`, true for good ones; columns `prompt`, `completion`."""

    kind: Literal["kto"]
    algorithm: KtoConfig = KtoConfig()

    @model_validator(mode="after")
    def _has_others(self) -> Self:
        if self.algorithm.loss_type == "kto" and self.batch_size < 2:
            raise ValueError(
                "batch_size: 1, but kto measures how far the policy has gone on the completions of the batch's other "
                "prompts; set batch_size to 2 or more, or algorithm.loss_type to apo_zero_unpaired"
            )
        return self


class OrpoRecipe(PreferenceRecipe):
    """Odds-ratio preference optimisation: pairs of answers, without a reference."""

    kind: Literal["orpo"]
    algorithm: OrpoConfig = OrpoConfig()


class CpoRecipe(PreferenceRecipe):
    """Contrastive preference optimisation, or SimPO: pairs of answers, without a reference."""

    kind: Literal["cpo"]
    algorithm: CpoConfig = CpoConfig()


class RewardRecipe(PreferenceRecipe):
    """A reward model: pairs of answers, of which the chosen one is to have the higher score."""

    kind: Literal["reward"]
    algorithm: BradleyTerryConfig = BradleyTerryConfig()

    @model_validator(mode="after")
    def _whole_model(self) -> Self:
        if self.policy.lora is not None:
            raise ValueError("policy.lora: a reward model's new head is trained with the whole model; remove lora")
        return self


PairRecipe = DpoRecipe | OrpoRecipe | CpoRecipe | RewardRecipe
