"""Log-probabilities of the loss tokens from hidden states and the output head: no N x V tensor ever exists.

The vocabulary is cut into slabs, and each slab's logits live no longer than it takes to add them up: forward to the
log-sum-exp and the entropy, backward, computed anew, to the gradients.

Legend: N = tokens, V = vocabulary, H = hidden size, W = tokens of one slab of the vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SLAB = 2**23
"""Logits that exist at once (32 MiB in float32): few enough to be no matter, enough for a large multiplication."""
LEAST = -1e4
_NARROWEST = 128
"""Tokens of a slab at least, however many rows there are."""


def head_logprobs_and_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    slab: int = SLAB,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy, both of softmax((hidden weight^T + bias) / temperature), both with gradient.

    The same numbers as `logprobs_and_entropy` gives for the logits of a linear layer: logits in the weight's dtype,
    everything after in at least float32. Gradients reach the hidden states, the weight and the bias, those that require
    one; the backward pass multiplies with the weight once more than that of full logits. `slab`: about so many logits
    exist at once. The online log-sum-exp is that of Milakov and Gimelshein (arXiv 1805.02867).
    """
    assert temperature > 0, f"got temperature {temperature}"
    assert slab > 0, f"got slab {slab}"
    assert hidden_NH.shape[:1] == targets_N.shape, f"got {hidden_NH.shape} hidden states, {targets_N.shape} targets"
    assert hidden_NH.shape[1:] == weight_VH.shape[1:], f"got hidden {hidden_NH.shape} and weight {weight_VH.shape}"
    logprobs_N, entropy_N = _HeadLogprobs.apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, slab)
    return logprobs_N, entropy_N


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        slab: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        sum_N, negentropy_N, target_N = (hidden_NH.new_zeros(len(hidden_NH), dtype=dtype) for _ in range(3))
        greatest_N = torch.full_like(sum_N, torch.finfo(dtype).min)
        for columns in slabs(len(weight_VH), len(hidden_NH), slab):
            scaled_NW = scaled(hidden_NH, weight_VH, bias_V, columns, temperature)
            place_N, inside_N = _place(targets_N, columns)
            target_N += scaled_NW.gather(-1, place_N[:, None])[:, 0].where(inside_N, 0.0)
            # Everything is kept relative to the greatest logit so far, and moves when a greater one is met.
            before_N, greatest_N = greatest_N, torch.maximum(greatest_N, scaled_NW.amax(-1))
            shift_N = before_N - greatest_N
            # e to the power of the least is 0, and so is its product with it; of -inf the product would be NaN.
            below_NW = scaled_NW.sub_(greatest_N[:, None]).clamp_(min=LEAST)
            exp_NW = below_NW.exp()
            negentropy_N = shift_N.exp() * (negentropy_N + shift_N * sum_N) + below_NW.mul_(exp_NW).sum(-1)
            sum_N = shift_N.exp() * sum_N + exp_NW.sum(-1)
        logsumexp_N = greatest_N + sum_N.log()
        entropy_N = sum_N.log() - negentropy_N / sum_N
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N, entropy_N)
        ctx.temperature, ctx.slab = temperature, slab
        return target_N - logsumexp_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, grad_entropy_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, logsumexp_N, entropy_N = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad, hidden_NH, weight_VH, bias_V)
        scale_N, entropy_scale_N = grad_N / ctx.temperature, grad_entropy_N / ctx.temperature
        by_entropy = bool(entropy_scale_N.any())  # hardly ever: only a bonus for entropy asks for it
        for columns in slabs(len(weight_VH), len(hidden_NH), ctx.slab):
            scaled_NW = scaled(hidden_NH, weight_VH, bias_V, columns, ctx.temperature)
            place_N, inside_N = _place(targets_N, columns)
            probs_NW = scaled_NW.sub_(logsumexp_N[:, None]).exp_()
            of_entropy_NW = _of_entropy(probs_NW, entropy_N, entropy_scale_N) if by_entropy else None
            grad_NW = probs_NW.mul_(-scale_N[:, None])
            if of_entropy_NW is not None:
                grad_NW += of_entropy_NW
            grad_NW = grad_NW.scatter_add_(-1, place_N[:, None], scale_N.where(inside_N, 0.0)[:, None])
            gradients.add(columns, grad_NW.to(weight_VH.dtype))
        return *gradients.of_inputs(), None, None, None


class HeadGradients:
    """Gradients of a head's hidden states, weight and bias, slab by slab; None for those that nobody needs."""

    def __init__(self, needed: tuple[bool, ...], hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self._hidden_NH, self._weight_VH = hidden_NH, weight_VH
        # Slabs of a lower precision are added up in float32, and rounded once.
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        self._of_hidden_NH = torch.zeros_like(hidden_NH, dtype=dtype) if needed[0] else None
        self._of_weight_VH = torch.zeros_like(weight_VH) if needed[1] else None
        self._of_bias_V = torch.zeros_like(bias_V) if bias_V is not None and needed[2] else None

    def add(self, columns: slice, grad_NW: Tensor) -> None:
        """What a slab's logits contribute; no slab comes twice."""
        if self._of_hidden_NH is not None:
            self._of_hidden_NH += grad_NW @ self._weight_VH[columns]
        if self._of_weight_VH is not None:
            self._of_weight_VH[columns] = grad_NW.T @ self._hidden_NH
        if self._of_bias_V is not None:
            self._of_bias_V[columns] = grad_NW.sum(0)

    def of_inputs(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_hidden_NH = None if self._of_hidden_NH is None else self._of_hidden_NH.to(self._hidden_NH.dtype)
        return of_hidden_NH, self._of_weight_VH, self._of_bias_V


def _of_entropy(probs_NW: Tensor, entropy_N: Tensor, scale_N: Tensor) -> Tensor:
    """The slab's logits' gradient of the entropy: -p (log p + entropy)."""
    return torch.special.entr(probs_NW).sub_(probs_NW * entropy_N[:, None]).mul_(scale_N[:, None])


def slabs(vocabulary: int, num_rows: int, slab: int) -> Iterator[slice]:
    """The vocabulary in slabs of equal width, but for the last."""
    width = max(_NARROWEST, slab // max(num_rows, 1))
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary))


def scaled(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, columns: slice, temperature: float) -> Tensor:
    """The slab's logits over the temperature, in at least float32."""
    bias_W = None if bias_V is None else bias_V[columns]
    logits_NW = nn.functional.linear(hidden_NH, weight_VH[columns], bias_W)
    return logits_NW.to(torch.promote_types(logits_NW.dtype, torch.float32)).div_(temperature)


def _place(targets_N: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Where in the slab each target is, and whether it is there at all; where it is not, some place."""
    inside_N = (targets_N >= columns.start) & (targets_N < columns.stop)
    return (targets_N - columns.start).where(inside_N, 0), inside_N
