"""Divergence of a student from a teacher at each token, from hidden states and output heads: there is no N x V tensor.

As in algorithms/head.py the vocabulary is cut into slabs whose logits live no longer than it takes to add them up; the
whole distributions are compared, nothing is left out of them.

Legend: N = tokens, V = vocabulary, H = hidden size of the student, K = that of the teacher, W = tokens of one slab.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from algorithms.head import LEAST, SLAB, HeadGradients, scaled, slabs


@dataclass(frozen=True, slots=True)
class Head:
    """An output head, and the hidden states that it is given."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None
    factor: float = 1.0
    """What its logits are multiplied with."""

    def logits(self, columns: slice, temperature: float) -> Tensor:
        """Of a slab, over the temperature, in at least float32."""
        return scaled(self.hidden_NH, self.weight_VH, self.bias_V, columns, temperature / self.factor)


def head_divergence(
    student: Head, teacher: Head, beta: float, temperature: float, slab: int = SLAB
) -> tuple[Tensor, Tensor]:
    """[N]: the generalised Jensen-Shannon divergence of the heads' distributions, and the student's entropy.

    It is beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (GKD, arXiv
    2306.13649); its limits are divergences of their own: at 0 KL(teacher || student), at 1 KL(student || teacher).
    The divergence has a gradient, which reaches the student's hidden states, weight and bias; the entropy has none.
    Models of one family pad their vocabularies to different sizes: both are taken over the tokens that both have.
    """
    assert 0 <= beta <= 1, f"beta mixes teacher and student, got {beta}"
    assert len(student.hidden_NH) == len(teacher.hidden_NH), "one hidden state of each for every token"
    divergence_N, entropy_N = _HeadDivergence.apply(
        student.hidden_NH, student.weight_VH, student.bias_V, student.factor, teacher, beta, temperature, slab
    )
    return divergence_N, entropy_N


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        factor: float,
        teacher: Head,
        beta: float,
        temperature: float,
        slab: int,
    ) -> tuple[Tensor, Tensor]:
        pair = _Pair(Head(hidden_NH, weight_VH, bias_V, factor), teacher, temperature, slab)
        sums = pair.logsumexps()
        of_teacher_N, of_student_N, entropy_N = (torch.zeros_like(sums[0]) for _ in range(3))
        for _, student_NW, teacher_NW in pair.logprobs(*sums):
            middle_NW = _middle(student_NW, teacher_NW, beta)
            of_teacher_N += (teacher_NW.exp() * (teacher_NW - middle_NW)).sum(-1)
            of_student_N += (student_NW.exp() * (student_NW - middle_NW)).sum(-1)
            entropy_N -= (student_NW.exp() * student_NW).sum(-1)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, *sums, of_student_N)
        ctx.factor, ctx.teacher, ctx.beta, ctx.temperature, ctx.slab = factor, teacher, beta, temperature, slab
        ctx.mark_non_differentiable(entropy_N)
        weight = _weight(beta)
        return weight * of_student_N + (1 - weight) * of_teacher_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, *sums, of_student_N = ctx.saved_tensors
        gradients = HeadGradients(ctx.needs_input_grad, hidden_NH, weight_VH, bias_V)
        pair = _Pair(Head(hidden_NH, weight_VH, bias_V, ctx.factor), ctx.teacher, ctx.temperature, ctx.slab)
        scale_N1 = (grad_N / (ctx.temperature / ctx.factor))[:, None]
        for columns, student_NW, teacher_NW in pair.logprobs(*sums):
            grad_NW = _by_logits(student_NW, teacher_NW, of_student_N[:, None], ctx.beta)
            gradients.add(columns, grad_NW.mul_(scale_N1).to(weight_VH.dtype))
        return *gradients.of_inputs(), None, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both heads, over the tokens that both have."""

    student: Head
    teacher: Head
    temperature: float
    slab: int

    def _slabs(self) -> Iterator[slice]:
        shared = min(len(self.student.weight_VH), len(self.teacher.weight_VH))
        return slabs(shared, len(self.student.hidden_NH), self.slab)

    def logsumexps(self) -> tuple[Tensor, Tensor]:
        """[N] of the student and of the teacher."""
        found: list[Tensor] = []
        for head in (self.student, self.teacher):
            dtype = torch.promote_types(head.hidden_NH.dtype, torch.float32)
            sum_N = torch.full((len(head.hidden_NH),), -math.inf, dtype=dtype, device=head.hidden_NH.device)
            for columns in self._slabs():
                sum_N = torch.logaddexp(sum_N, head.logits(columns, self.temperature).logsumexp(-1))
            found.append(sum_N)
        student_N, teacher_N = found
        return student_N, teacher_N

    def logprobs(self, student_N: Tensor, teacher_N: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slab by slab the log-probabilities of the student and of the teacher."""
        for columns in self._slabs():
            # e to the power of the least is 0, and so is its product with it; of -inf the product would be NaN.
            student_NW, teacher_NW = (
                head.logits(columns, self.temperature).sub_(sum_N[:, None]).clamp_(min=LEAST)
                for head, sum_N in ((self.student, student_N), (self.teacher, teacher_N))
            )
            yield columns, student_NW, teacher_NW


def _weight(beta: float) -> float:
    """Of KL(student || middle); the rest is KL(teacher || middle). The limits are divergences of their own."""
    return beta if beta in (0, 1) else 1 - beta


def _middle(student_NW: Tensor, teacher_NW: Tensor, beta: float) -> Tensor:
    """What both are compared with: the mixture, and in the limits the other one."""
    if beta == 0:
        return student_NW
    if beta == 1:
        return teacher_NW
    return torch.logaddexp(teacher_NW + math.log(beta), student_NW + math.log1p(-beta))


def _by_logits(student_NW: Tensor, teacher_NW: Tensor, of_student_N1: Tensor, beta: float) -> Tensor:
    """Gradient of the divergence by the student's logits: w p (log p/m - KL(p || m)), and p - q for KL(q || p).

    The mixture's own dependence on p cancels out: the derivatives of both parts by m sum to -1 at every token.
    """
    probs_NW = student_NW.exp()
    if beta == 0:
        return probs_NW.sub_(teacher_NW.exp())
    distance_NW = (student_NW - _middle(student_NW, teacher_NW, beta)).sub_(of_student_N1)
    return probs_NW.mul_(distance_NW).mul_(_weight(beta))
