"""The loss tokens of one micro-batch; a token that is left out leaves all arrays, and stays in the counts that divide.

Legend: N = loss tokens of the micro-batch, S = its sequences. A sequence lies in one micro-batch with all its tokens.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from algorithms.corrections import sequence_sum


@dataclass(frozen=True, slots=True)
class Tokens:
    """Flat over the tokens, sequence after sequence and in order; all arrays have one length."""

    logprobs_N: Tensor
    """Of the policy that is trained; the gradient goes through these, and through the entropy."""
    entropy_N: Tensor
    sampled_logprobs_N: Tensor
    """Recorded at sampling; NaN where unknown."""
    start_logprobs_N: Tensor
    """Of the policy when the step began, without gradient."""
    reference_logprobs_N: Tensor | None
    advantages_N: Tensor
    age_N: Tensor
    """Versions between the weights that sampled the token and those that the step began with."""
    lengths_N: Tensor
    """Loss tokens of the token's sequence, left out or not."""
    sequence_N: Tensor
    """Which of the S sequences the token belongs to (int64)."""
    num_sequences: int
    num_tokens: int
    """Loss tokens of the micro-batch, left out or not."""

    def __len__(self) -> int:
        return len(self.logprobs_N)

    def only(self, fresh_N: Tensor | None) -> "Tokens":
        """Those that are fresh; a sequence without any is no sequence any more. None: all are."""
        if fresh_N is None:
            return self
        # By selection, not by a factor: 0 x inf is NaN, and so is its gradient. What is not selected has gradient 0.
        names = (field.name for field in fields(self) if field.name.endswith("_N"))
        kept: dict[str, Any] = {name: values[fresh_N] for name in names if (values := getattr(self, name)) is not None}
        # A sequence without a fresh token is in no statistic: its importance weight would be the empty product.
        present, sequence_N = kept["sequence_N"].unique(return_inverse=True)
        return replace(self, **kept | {"sequence_N": sequence_N, "num_sequences": len(present)})


def lengths(sequence_N: Tensor, num_sequences: int, like_N: Tensor) -> Tensor:
    """[N]: how many tokens each token's sequence has, in the dtype of `like_N`."""
    return sequence_sum(torch.ones_like(like_N), sequence_N, num_sequences)[sequence_N]
