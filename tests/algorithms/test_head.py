"""Log-probabilities without logits against those of full logits: values, gradients, and the memory they do not take.

Legend: N = tokens, V = vocabulary, H = hidden size.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from algorithms.head import head_logprobs_and_entropy
from algorithms.logprobs import logprobs_and_entropy
from tests.algorithms.largest_output import LargestOutput

VOCABULARY = 300  # over two slabs of the narrowest width


def problem(
    num_tokens: int, dtype: torch.dtype, bias: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(seed)
    hidden_NH = torch.randn(num_tokens, 16, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VH = torch.randn(VOCABULARY, 16, dtype=torch.float64).to(dtype).requires_grad_()
    bias_V = torch.randn(VOCABULARY, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden_NH, weight_VH, bias_V, torch.randint(VOCABULARY, (num_tokens,))


@pytest.mark.parametrize("slab", [1, 1500, 2**20])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "value_tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 2e-2)],
)
@pytest.mark.parametrize("num_tokens", [0, 1, 10])
def test_values_and_gradients_are_those_of_full_logits(
    num_tokens: int,
    dtype: torch.dtype,
    value_tolerance: float,
    gradient_tolerance: float,
    bias: bool,
    temperature: float,
    slab: int,
) -> None:
    hidden_NH, weight_VH, bias_V, targets_N = problem(num_tokens, dtype, bias)
    inputs = [hidden_NH, weight_VH] + ([] if bias_V is None else [bias_V])
    logits_NV = nn.functional.linear(hidden_NH, weight_VH, bias_V)
    expected_N, expected_entropy_N = logprobs_and_entropy(logits_NV, targets_N, temperature, 64)
    logprobs_N, entropy_N = head_logprobs_and_entropy(hidden_NH, weight_VH, bias_V, targets_N, temperature, slab)
    assert logprobs_N.dtype == entropy_N.dtype == expected_N.dtype
    torch.testing.assert_close(logprobs_N, expected_N, rtol=0, atol=value_tolerance)
    torch.testing.assert_close(entropy_N, expected_entropy_N, rtol=0, atol=value_tolerance)
    upstream_N2 = torch.randn(num_tokens, 2, dtype=torch.float64).to(logprobs_N.dtype)
    # Of each alone, and of both together as they come out of the model.
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])):
        given = torch.stack([logprobs_N, entropy_N], -1)
        wanted = torch.stack([expected_N, expected_entropy_N], -1)
        ours, theirs = (
            torch.autograd.grad(both, inputs, upstream_N2 * weights.to(upstream_N2), retain_graph=True)
            for both in (given, wanted)
        )
        for given_grad, wanted_grad in zip(ours, theirs, strict=True):
            assert given_grad.dtype == dtype
            torch.testing.assert_close(given_grad, wanted_grad, rtol=gradient_tolerance, atol=gradient_tolerance)
    for one, other in ((logprobs_N, expected_N), (entropy_N, expected_entropy_N)):
        (alone,) = torch.autograd.grad(one.sum(), [hidden_NH], retain_graph=True)
        (expected,) = torch.autograd.grad(other.sum(), [hidden_NH], retain_graph=True)
        torch.testing.assert_close(alone, expected, rtol=gradient_tolerance, atol=gradient_tolerance)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 40),
    st.integers(1, 20_000),
    st.floats(0.1, 3.0),
    st.floats(0.1, 100.0),
    st.integers(0, 2**16),
)
def test_any_cut_of_the_vocabulary_gives_the_same(
    num_tokens: int, slab: int, temperature: float, size: float, seed: int
) -> None:
    hidden_NH, weight_VH, _, targets_N = problem(num_tokens, torch.float64, False, seed)
    whole_N, whole_entropy_N = head_logprobs_and_entropy(size * hidden_NH, weight_VH, None, targets_N, temperature)
    cut_N, cut_entropy_N = head_logprobs_and_entropy(size * hidden_NH, weight_VH, None, targets_N, temperature, slab)
    torch.testing.assert_close(cut_N, whole_N, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(cut_entropy_N, whole_entropy_N, rtol=1e-9, atol=1e-9)
    assert (cut_entropy_N >= -1e-12).all()


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    hidden_NH = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(130, 2, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(130, dtype=torch.float64, requires_grad=True)
    targets_N = torch.tensor([0, 127, 128])

    def logprobs(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
        return torch.cat(head_logprobs_and_entropy(hidden_NH, weight_VH, bias_V, targets_N, 0.8, 1))

    assert torch.autograd.gradcheck(logprobs, (hidden_NH, weight_VH, bias_V))


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_theirs() -> None:
    hidden_NH, weight_VH, _, targets_N = problem(5, torch.float64, False)
    (expected_NH,) = torch.autograd.grad(
        head_logprobs_and_entropy(hidden_NH, weight_VH, None, targets_N, 1.0)[0].sum(), hidden_NH
    )
    frozen_VH = weight_VH.detach()
    head_logprobs_and_entropy(hidden_NH, frozen_VH, None, targets_N, 1.0)[0].sum().backward()
    assert frozen_VH.grad is None
    assert hidden_NH.grad is not None
    assert torch.equal(hidden_NH.grad, expected_NH)


def test_extreme_logits_give_no_nan() -> None:
    """Also a slab in which every token is ruled out, and a row whose logits are far from 0."""
    hidden_NH = torch.tensor([[1.0], [1e4]], requires_grad=True)
    weight_VH = torch.zeros(256, 1)
    weight_VH[130] = 1.0
    bias_V = torch.full((256,), -torch.inf)
    bias_V[128:132] = 0.0
    logprobs_N, entropy_N = head_logprobs_and_entropy(hidden_NH, weight_VH, bias_V, torch.tensor([128, 130]), 1.0, 1)
    logprobs_N.sum().backward()
    sure = torch.tensor([1.0, 0.0, 0.0, 0.0]).log_softmax(0)
    torch.testing.assert_close(logprobs_N, torch.tensor([sure[1], 0.0]))
    torch.testing.assert_close(entropy_N, torch.tensor([-(sure.exp() * sure).sum(), 0.0]))
    assert hidden_NH.grad is not None
    assert hidden_NH.grad.isfinite().all()


def test_no_tensor_is_as_large_as_the_logits() -> None:
    num_tokens, vocabulary, hidden = 512, 4096, 8
    hidden_NH = torch.randn(num_tokens, hidden, requires_grad=True)
    weight_VH = torch.randn(vocabulary, hidden, requires_grad=True)
    targets_N = torch.randint(vocabulary, (num_tokens,))
    slab = num_tokens * 128
    with LargestOutput(slab + 1) as forward:
        logprobs_N, _ = head_logprobs_and_entropy(hidden_NH, weight_VH, None, targets_N, 0.9, slab)
    assert forward.largest == slab
    with LargestOutput(slab + 1) as backward:
        torch.autograd.grad(logprobs_N, (hidden_NH, weight_VH), torch.ones_like(logprobs_N))
    assert backward.largest == slab, "the gradients themselves are smaller here"
