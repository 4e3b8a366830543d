"""What a step of the policy minimises, and what it computes of each sequence for that."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from algorithms.config import GrpoConfig
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
    numbers: Literal["logprobs", "scores", "values"] | None = None
    """What each sequence amounts to: the log-probability of its loss tokens, or a reward model's score at its end; or
    what a critic says before each of its loss tokens."""
    cliprange_value: float = 0.0
    """Of a critic."""

    @property
    def num_iterations(self) -> int:
        """Updates of the optimizer on each batch."""
        return 1 if self.grpo is None else self.grpo.num_iterations

    @property
    def has_scalar_head(self) -> bool:
        """Whether the model gives one number at a token, and no distribution."""
        return self.numbers in ("scores", "values")

    def values(self, model: Any, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each loss token; of a reward model or a critic its number, and entropy 0."""
        from actors.model.forward import row_logprobs, row_scores, row_values

        if self.has_scalar_head:
            scores_N = (row_scores if self.numbers == "scores" else row_values)(model, row)
            return scores_N, torch.zeros_like(scores_N)
        return row_logprobs(model, row, self.temperature)

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
            return weighted_sum(values_N, entropy_N, row.advantages_N)
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
