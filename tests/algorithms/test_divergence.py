"""Slab by slab the divergence and its gradients are those of full logits, which are TRL's.

Legend: N = tokens, V = vocabulary, H and K = hidden sizes of student and teacher.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer

from algorithms.divergence import Head, head_divergence
from tests.algorithms.full_divergence import generalized_jsd
from tests.algorithms.largest_output import LargestOutput

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def heads(vocabulary: int = 517, of_teacher: int | None = None, bias: bool = True) -> tuple[Head, Head]:
    torch.manual_seed(0)
    bias_V = torch.randn(vocabulary).requires_grad_() if bias else None
    student = Head(torch.randn(7, 12).requires_grad_(), torch.randn(vocabulary, 12).requires_grad_(), bias_V)
    return student, Head(torch.randn(7, 20), torch.randn(of_teacher or vocabulary, 20) / 2)


def full(head: Head, vocabulary: int | None = None) -> Tensor:
    return torch.nn.functional.linear(head.hidden_NH, head.weight_VH, head.bias_V)[:, :vocabulary]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradient_are_trls(beta: float, temperature: float, bias: bool) -> None:
    """Of a mean over tokens; the smallest slabs that there are."""
    student, teacher = heads(bias=bias)
    divergence_N, entropy_N = head_divergence(student, teacher, beta, temperature, slab=1)
    theirs = GKDTrainer.generalized_jsd_loss(
        full(student)[None], full(teacher)[None], torch.zeros(1, 7), beta, temperature
    )
    assert divergence_N.mean().item() == pytest.approx(theirs.item(), abs=1e-10)
    wanted = [tensor for tensor in (student.hidden_NH, student.weight_VH, student.bias_V) if tensor is not None]
    ours, expected = (torch.autograd.grad(loss, wanted) for loss in (divergence_N.mean(), theirs))
    assert expected[1].abs().max() > 1e-3
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
    probabilities = (full(student) / temperature).softmax(-1)
    torch.testing.assert_close(entropy_N, torch.special.entr(probabilities).sum(-1))
    assert not entropy_N.requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_logits_that_are_multiplied_behind_the_heads(beta: float) -> None:
    student, teacher = heads()
    student, teacher = replace(student, factor=0.3), replace(teacher, factor=1.7)
    divergence_N, entropy_N = head_divergence(student, teacher, beta, 0.7, slab=1)
    expected_N = generalized_jsd(0.3 * full(student), 1.7 * full(teacher), beta, 0.7)
    torch.testing.assert_close(divergence_N, expected_N, rtol=0, atol=1e-10)
    wanted = [tensor for tensor in (student.hidden_NH, student.weight_VH, student.bias_V) if tensor is not None]
    ours, expected = (torch.autograd.grad(loss.sum(), wanted) for loss in (divergence_N, expected_N))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy_N, torch.special.entr((0.3 * full(student) / 0.7).softmax(-1)).sum(-1))


@pytest.mark.parametrize("beta", BETAS)
def test_in_float32_it_is_trls_to_1e5(beta: float) -> None:
    torch.set_default_dtype(torch.float32)
    student, teacher = heads()
    divergence_N, _ = head_divergence(student, teacher, beta, 1.0, slab=2000)
    theirs = GKDTrainer.generalized_jsd_loss(full(student)[None], full(teacher)[None], torch.zeros(1, 7), beta)
    assert divergence_N.mean().item() == pytest.approx(theirs.item(), abs=1e-5)
    ours, expected = (torch.autograd.grad(loss, student.hidden_NH)[0] for loss in (divergence_N.mean(), theirs))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("of_teacher", [500, 540])
def test_vocabularies_of_different_padding_meet_where_both_have_tokens(beta: float, of_teacher: int) -> None:
    student, teacher = heads(517, of_teacher)
    shared = min(517, of_teacher)
    divergence_N, _ = head_divergence(student, teacher, beta, 1.0, slab=1)
    expected_N = generalized_jsd(full(student, shared), full(teacher, shared), beta)
    torch.testing.assert_close(divergence_N, expected_N)
    ours, expected = (torch.autograd.grad(loss.sum(), student.weight_VH)[0] for loss in (divergence_N, expected_N))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_is_ruled_out_is_no_nan(beta: float) -> None:
    student, teacher = heads()
    assert student.bias_V is not None
    with torch.no_grad():
        student.bias_V[3] = -torch.inf
    divergence_N, entropy_N = head_divergence(student, teacher, beta, 1.0, slab=1)
    (gradient,) = torch.autograd.grad(divergence_N.sum(), student.hidden_NH)
    assert divergence_N.isfinite().all()
    assert entropy_N.isfinite().all()
    assert gradient.isfinite().all()


def test_no_tensor_is_as_large_as_the_logits() -> None:
    torch.manual_seed(0)
    student = Head(torch.randn(64, 8).requires_grad_(), torch.randn(20_000, 8).requires_grad_())
    teacher = Head(torch.randn(64, 8), torch.randn(20_000, 8))
    with LargestOutput(1) as seen:
        divergence_N, _ = head_divergence(student, teacher, 0.5, 1.0, slab=64 * 1000)
        divergence_N.sum().backward()
    assert seen.largest < 64 * 20_000 / 4


def test_without_tokens_there_is_a_graph_and_no_loss() -> None:
    student, teacher = heads()
    none = Head(student.hidden_NH[:0], student.weight_VH, student.bias_V)
    divergence_N, _ = head_divergence(none, Head(teacher.hidden_NH[:0], teacher.weight_VH), 0.5, 1.0)
    assert divergence_N.shape == (0,)
    (gradient,) = torch.autograd.grad(divergence_N.sum(), student.weight_VH)
    assert gradient.abs().max() == 0
