"""Log-probabilities of the sampled tokens cost the memory of a few chunks of the logits, not of several copies of them.

Legend: N = tokens, V = vocabulary, C = rows of one chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def logprobs_and_entropy(
    logits_NV: Tensor, targets_N: Tensor, temperature: float, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of the distribution, both of softmax(logits / temperature), both with gradient.

    Computed in float32 (float64 for float64 logits), `chunk_size` rows at a time. Nothing of size N x V is kept for
    the backward pass but the logits themselves, whose gradient (N x V, in their dtype) is filled chunk by chunk from
    recomputed probabilities: d log p(target) / d logit_v = ([v = target] - p_v) / temperature, and
    d entropy / d logit_v = -p_v (log p_v + entropy) / temperature where the entropy is used. Entropy in nats.
    """
    assert temperature > 0, f"got temperature {temperature}"
    assert chunk_size > 0, f"got chunk_size {chunk_size}"
    assert logits_NV.shape[:1] == targets_N.shape, f"got {logits_NV.shape} logits for {targets_N.shape} targets"
    logprobs_N, entropy_N = _TargetLogprobs.apply(logits_NV, targets_N, temperature, chunk_size)
    return logprobs_N, entropy_N


def _scaled(logits_CV: Tensor, temperature: float) -> Tensor:
    """The chunk over the temperature, in at least float32."""
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)) / temperature


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits_NV: Tensor,
        targets_N: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        logprobs_N, entropy_N, logsumexp_N = (
            torch.empty(len(logits_NV), dtype=dtype, device=logits_NV.device) for _ in range(3)
        )
        for start in range(0, len(logits_NV), chunk_size):
            rows = slice(start, start + chunk_size)
            scaled_CV = _scaled(logits_NV[rows], temperature)
            logsumexp_N[rows] = scaled_CV.logsumexp(-1)
            logprobs_N[rows] = scaled_CV.gather(-1, targets_N[rows, None])[:, 0] - logsumexp_N[rows]
            # entr(p) = -p log p is 0 at p = 0, so that a logit of -inf (a token that is ruled out) gives no NaN.
            probs_CV = scaled_CV.sub_(logsumexp_N[rows, None]).exp_()
            entropy_N[rows] = torch.special.entr(probs_CV).sum(-1)
        ctx.save_for_backward(logits_NV, targets_N, logsumexp_N, entropy_N)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size  # type: ignore[attr-defined]
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_N: Tensor | None, grad_entropy_N: Tensor | None) -> tuple[Tensor, None, None, None]:  # type: ignore
        logits_NV, targets_N, logsumexp_N, entropy_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(entropy_N)
        for start in range(0, len(logits_NV), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            scale_C1 = (grad_logprobs_N[rows] / ctx.temperature)[:, None]
            scaled_CV = _scaled(logits_NV[rows], ctx.temperature)
            probs_CV = scaled_CV.sub_(logsumexp_N[rows, None]).exp_()
            if grad_entropy_N is not None:
                by_entropy_CV = torch.special.entr(probs_CV).sub_(probs_CV * entropy_N[rows, None])
                by_entropy_CV.mul_((grad_entropy_N[rows] / ctx.temperature)[:, None])
            grad_CV = probs_CV.mul_(-scale_C1).scatter_add_(-1, targets_N[rows, None], scale_C1)
            grad_NV[rows] = grad_CV if grad_entropy_N is None else grad_CV.add_(by_entropy_CV)
        return grad_NV, None, None, None
