"""One number per sequence of the global batch, and what else a loss needs of it.

Legend: P = pairs, S = sequences that are judged one by one.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """Entry p of each array is about pair p: a chosen and a rejected answer to one prompt."""

    chosen_P: Tensor
    """Log-probability of the chosen completion, summed over its tokens; of a reward model the score."""
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    """Tokens that the sum is over."""
    rejected_tokens_P: Tensor
    reference_chosen_P: Tensor | None = None
    """The same sums under the reference."""
    reference_rejected_P: Tensor | None = None
    margin_P: Tensor | None = None
    """By how much the chosen answer is better, where the data say so."""

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log of the policy's probability over the reference's, of the chosen and of the rejected completions."""
        assert self.reference_chosen_P is not None, "this loss is against a reference"
        assert self.reference_rejected_P is not None, "this loss is against a reference"
        return self.chosen_P - self.reference_chosen_P, self.rejected_P - self.reference_rejected_P

    @property
    def chosen_nll(self) -> Tensor:
        """Mean negative log-likelihood of the chosen completions' tokens."""
        return -self.chosen_P.sum() / self.chosen_tokens_P.sum()


@dataclass(frozen=True, slots=True)
class Judged:
    """Entry s of each array is about sequence s, whose completion is good or bad."""

    logprobs_S: Tensor
    reference_S: Tensor
    good_S: Tensor
    """Whether the completion is desirable (bool)."""
    kl: Tensor
    """Estimate of the divergence from the reference, never negative; no gradient flows through it."""
