"""What algorithms/divergence.py computes slab by slab, from whole logits.

Legend: N = tokens, V = vocabulary.
"""

import math

import torch
from torch import Tensor


def generalized_jsd(student_NV: Tensor, teacher_NV: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """[N]: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student; of logits.

    The limits are divergences of their own: 0 is the forward KL(teacher || student), 1 the reverse KL(student ||
    teacher).
    """
    assert 0 <= beta <= 1, f"beta mixes teacher and student, got {beta}"
    student_NV = (student_NV / temperature).log_softmax(-1)
    teacher_NV = (teacher_NV / temperature).log_softmax(-1)
    if beta == 0:
        return kl_divergence(teacher_NV, student_NV)
    if beta == 1:
        return kl_divergence(student_NV, teacher_NV)
    mixture_NV = torch.logaddexp(teacher_NV + math.log(beta), student_NV + math.log1p(-beta))
    return beta * kl_divergence(teacher_NV, mixture_NV) + (1 - beta) * kl_divergence(student_NV, mixture_NV)


def kl_divergence(one_NV: Tensor, other_NV: Tensor) -> Tensor:
    """[N]: KL(one || other), both log-probabilities."""
    return (one_NV.exp() * (one_NV - other_NV)).sum(-1)
