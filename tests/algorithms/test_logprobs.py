"""Chunked log-probabilities against torch.log_softmax: values, gradients, and the memory that they do not take.

Legend: N = tokens, V = vocabulary.
"""

import pytest
import torch
from torch import Tensor

from algorithms.logprobs import logprobs_and_entropy
from tests.algorithms.largest_output import LargestOutput


def reference(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    all_NV = (logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature).log_softmax(-1)
    return all_NV.gather(-1, targets_N[:, None])[:, 0], -(all_NV.exp() * all_NV).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 2e-6, 1e-6), (torch.bfloat16, 2e-6, 1e-2)],
)
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 10])
def test_values_and_gradient(
    num_tokens: int,
    dtype: torch.dtype,
    value_tolerance: float,
    gradient_tolerance: float,
    temperature: float,
    chunk_size: int,
) -> None:
    torch.manual_seed(num_tokens)
    logits_NV = (4 * torch.randn(num_tokens, 50, dtype=torch.float64)).to(dtype).requires_grad_()
    targets_N, upstream_N = torch.randint(50, (num_tokens,)), torch.randn(num_tokens, dtype=torch.float64)
    expected_N, expected_entropy_N = reference(logits_NV, targets_N, temperature)
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, targets_N, temperature, chunk_size)
    assert logprobs_N.dtype == entropy_N.dtype == expected_N.dtype
    assert logprobs_N.requires_grad
    assert entropy_N.requires_grad
    torch.testing.assert_close(logprobs_N, expected_N, rtol=0, atol=value_tolerance)
    torch.testing.assert_close(entropy_N, expected_entropy_N, rtol=0, atol=value_tolerance)
    upstream_N = upstream_N.to(logprobs_N.dtype)
    (ours_NV,) = torch.autograd.grad(logprobs_N, logits_NV, upstream_N)
    (theirs_NV,) = torch.autograd.grad(expected_N, logits_NV, upstream_N)
    assert ours_NV.dtype == dtype
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=gradient_tolerance, atol=gradient_tolerance)


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    logits_NV, targets_N = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.randint(6, (5,))
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, targets_N, 0.8, 2)[0], logits_NV)
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, targets_N, 0.8, 2)[1], logits_NV)
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, targets_N, 0.8, 2), logits_NV)


def test_the_logits_stay_as_they_are() -> None:
    logits_NV = torch.randn(6, 9, requires_grad=True)
    before_NV = logits_NV.detach().clone()
    logprobs_and_entropy(logits_NV, torch.zeros(6, dtype=torch.long), 1.0, 4)[0].sum().backward()
    assert torch.equal(logits_NV.detach(), before_NV)


def test_extreme_logits_give_no_nan() -> None:
    logits_NV = torch.tensor([[1e4, -1e4, 0.0], [0.0, -torch.inf, 0.0]], requires_grad=True)
    logprobs_N, entropy_N = logprobs_and_entropy(logits_NV, torch.tensor([0, 2]), 1.0, 8)
    (logprobs_N.sum() + entropy_N.sum()).backward()
    torch.testing.assert_close(logprobs_N, torch.tensor([0.0, -0.6931472]))
    torch.testing.assert_close(entropy_N, torch.tensor([0.0, 0.6931472]))
    assert logits_NV.grad is not None
    assert logits_NV.grad.isfinite().all()


def test_nothing_beyond_a_chunk_is_allocated_but_the_gradient() -> None:
    num_tokens, vocabulary, chunk_size = 64, 100, 4
    logits_NV = torch.randn(num_tokens, vocabulary, requires_grad=True)
    targets_N = torch.randint(vocabulary, (num_tokens,))
    saved: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
        ),
        LargestOutput(num_tokens * vocabulary) as forward,
    ):
        logprobs_N, _ = logprobs_and_entropy(logits_NV, targets_N, 0.9, chunk_size)
    assert forward.largest == chunk_size * vocabulary
    assert all(tensor.numel() <= num_tokens for tensor in saved if tensor.data_ptr() != logits_NV.data_ptr())
    with LargestOutput(num_tokens * vocabulary) as backward:
        torch.autograd.grad(logprobs_N, logits_NV, torch.ones_like(logprobs_N))
    assert backward.largest == num_tokens * vocabulary
    assert backward.num_large == 1, "the gradient itself, once"
