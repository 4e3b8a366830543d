"""What a step of the policy minimises, and what it computes of each sequence for that."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from actors.model.team import SOLO, Team
from algorithms.config import GrpoConfig
from algorithms.gkd import DistillationConfig
from algorithms.losses import Normalizer, grpo_loss, sft_loss, value_loss
from algorithms.packed import PackedRow
from algorithms.preference.weigh import weighted_sum
from algorithms.stats import LossStats


@dataclass(frozen=True, slots=True)
class Objective:
    """What a step minimises: of a critic's values their loss, of other `numbers` the weighted sum, else GRPO when
    `grpo` is given, else the supervised loss."""

    grpo: GrpoConfig | None
    temperature: float
    max_completion_length: int
    numbers: Literal["logprobs", "scores", "values", "divergences"] | None = None
    """What each sequence amounts to: the log-probability of its loss tokens, a reward model's score at its end, what a
    critic says before each of its loss tokens, or how far these are from a teacher's."""
    cliprange_value: float = 0.0
    """Of a critic."""
    distillation: DistillationConfig | None = None
    """Which divergence from the teacher, where it is that."""
    reference_below: bool = False
    """The reference is the policy without its adapter, so the ranks themselves have its log-probabilities."""

    @property
    def num_iterations(self) -> int:
        """Updates of the optimizer on each batch."""
        return 1 if self.grpo is None else self.grpo.num_iterations

    @property
    def has_scalar_head(self) -> bool:
        """Whether the model gives one number at a token, and no distribution."""
        return self.numbers in ("scores", "values")

    def values(self, model: Any, row: PackedRow, teacher: Any = None, team: Team = SOLO) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each loss token; of a reward model or a critic its number, and entropy 0; with
        distillation the divergence from the teacher, and the entropy. Every rank of the team makes this call."""
        from actors.model.forward import row_divergences, row_logprobs, row_scores, row_values

        if self.distillation is not None:
            return row_divergences(model, teacher, row, self.distillation.beta, self.distillation.temperature, team)
        if self.has_scalar_head:
            scores_N = (row_scores if self.numbers == "scores" else row_values)(model, row, team)
            return scores_N, torch.zeros_like(scores_N)
        return row_logprobs(model, row, self.temperature, team)

    def referred(self, model: Any, row: PackedRow, team: Team = SOLO) -> PackedRow:
        """The row with the reference's log-probabilities; they came with the rollouts unless the reference is below."""
        if not self.reference_below:
            return row
        from actors.model.forward import row_logprobs
        from actors.model.lora import without_adapter

        was_training = model.training
        model.eval()
        with torch.no_grad(), without_adapter(model):
            reference_N, _ = row_logprobs(model, row, self.temperature, team)
        model.train(was_training)
        return replace(row, reference_logprobs_N=reference_N)

    def loss(
        self, row: PackedRow, values_N: Tensor, entropy_N: Tensor, start_N: Tensor, normalizer: Normalizer
    ) -> tuple[Tensor, LossStats]:
        """The row's share of the loss of the global batch; `start_N` are the values with which the step began.

        A critic learns returns, which take the place of advantages.
        """
        if self.numbers == "values":
            return value_loss(
                values_N,
                start_N,
                row.advantages_N,
                cliprange_value=self.cliprange_value,
                num_loss_tokens=normalizer.num_loss_tokens,
                fresh_N=row.fresh_N,
            )
        if self.numbers is not None:
            values_N, entropy_N, weights_N = (each[row.fresh_N] for each in (values_N, entropy_N, row.advantages_N))
            return weighted_sum(values_N, entropy_N, weights_N)
        if self.grpo is None:
            return sft_loss(values_N, entropy_N, normalizer.num_loss_tokens)
        return grpo_loss(
            values_N,
            entropy_N,
            sampled_logprobs_N=row.sampled_logprobs_N,
            reference_logprobs_N=row.reference_logprobs_N,
            advantages_N=row.advantages_N,
            sequence_N=row.sequence_N,
            num_sequences=len(row.lengths_S),
            config=self.grpo,
            normalizer=normalizer,
            fresh_N=row.fresh_N,
            age_N=row.age_N,
            start_logprobs_N=start_N,
        )
