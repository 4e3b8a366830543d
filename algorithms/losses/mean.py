"""The shares of all micro-batches and ranks sum to the mean over the global batch, however the batch is cut."""

from dataclasses import dataclass

from torch import Tensor

from algorithms.config import LossType
from algorithms.losses.tokens import Tokens
from algorithms.types import Batch


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Counts over the global batch before any rejection, so that a masked token leaves the others' weight as it was."""

    num_sequences: int
    """Every rollout of the batch, with the truncated ones that `mask_truncated_completions` left out, as TRL counts."""
    num_loss_tokens: int
    max_completion_length: int
    num_micro_batches: int
    """Micro-batches with loss tokens, over all ranks; empty ones only keep the ranks in step."""
    kl_weight: float = 0.0
    """Of the KL estimate in each token's advantage (losses/kl.py): beta over what has divided the batch's rewards."""

    @classmethod
    def of(cls, batch: Batch, max_completion_length: int) -> "Normalizer":
        return cls(
            num_sequences=batch.num_sequences,
            num_loss_tokens=batch.num_loss_tokens,
            max_completion_length=max_completion_length,
            num_micro_batches=sum(bool(micro_batch.samples) for rank in batch.ranks for micro_batch in rank),
            kl_weight=batch.kl_weight,
        )


def share(loss_N: Tensor, tokens: Tokens, loss_type: LossType, normalizer: Normalizer) -> Tensor:
    """What these tokens add to the global mean that `loss_type` names."""
    match loss_type:
        case "grpo":
            return (loss_N / tokens.lengths_N).sum() / normalizer.num_sequences
        case "dapo" | "cispo":
            return loss_N.sum() / normalizer.num_loss_tokens
        case "dr_grpo":
            return loss_N.sum() / (normalizer.num_sequences * normalizer.max_completion_length)
        case "bnpo":
            return loss_N.sum() / tokens.num_tokens / normalizer.num_micro_batches
