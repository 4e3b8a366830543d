"""A model gets liger-kernel's kernels on GPUs alone, where it is known, and never those of the head and the loss."""

import importlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from actors.model import kernels
from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.head import put_scoring_head
from actors.model.kernels import KNOWN, Wish, check_kernels, put_kernels
from algorithms.packed import pack_row
from algorithms.types import Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, PreTrainedModel, dict[str, bool]]]:
    """What a package in liger-kernel's place was asked for."""
    asked: list[tuple[str, PreTrainedModel, dict[str, bool]]] = []
    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.transformers = module  # type: ignore[attr-defined]
    for name in KNOWN:

        def apply(model: PreTrainedModel, name: str = name, **which: bool) -> None:
            asked.append((name, model, which))

        setattr(module, f"apply_liger_kernel_to_{name}", apply)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    return asked


def model(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("wish", ["auto", True])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_norms_rotation_and_mlp_are_replaced(applied: list[Any], kind: Any, wish: Wish) -> None:
    made = model(kind(**SIZES))
    assert put_kernels(made, wish, use_gpu=True)
    ((name, its, which),) = applied
    assert (name, its) == (kind.model_type, made)
    assert {part for part, wanted in which.items() if wanted} == {"rope", "rms_norm", "swiglu"}
    assert {part for part, wanted in which.items() if not wanted} == {"cross_entropy", "fused_linear_cross_entropy"}


@pytest.mark.parametrize(("wish", "use_gpu"), [(False, True), ("auto", False)])
def test_a_model_without_them_stays_as_it_is(applied: list[Any], wish: Wish, use_gpu: bool) -> None:
    assert not put_kernels(model(LlamaConfig(**SIZES)), wish, use_gpu)
    assert applied == []


def test_a_model_of_another_type_is_left_alone_or_refused(applied: list[Any]) -> None:
    made = model(GemmaConfig(**SIZES))
    assert not put_kernels(made, "auto", use_gpu=True)
    with pytest.raises(ValueError, match=r"policy.liger: true, but models of type 'gemma' .* set policy.liger to auto"):
        put_kernels(made, True, use_gpu=True)
    assert applied == []


def test_what_is_not_installed_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not put_kernels(model(LlamaConfig(**SIZES)), "auto", use_gpu=True)
    check_kernels(True, use_gpu=False)  # a critic without GPUs beside a policy that has some
    with pytest.raises(ValueError, match=r"policy.liger: true needs the package liger-kernel.*gpu_extra.txt"):
        check_kernels(True, use_gpu=True)


@pytest.fixture
def layers(request: pytest.FixtureRequest) -> Iterator[str]:
    """A model type, whose classes are as they were when the test ends: liger-kernel puts its own in their place."""
    modeling = importlib.import_module(f"transformers.models.{request.param}.modeling_{request.param}")
    before = dict(vars(modeling))
    yield request.param
    vars(modeling).update(before)


@pytest.mark.gpu
@pytest.mark.skipif(
    find_spec("liger_kernel") is None or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="needs liger-kernel, and a GPU or triton's interpreter",
)
@pytest.mark.parametrize("layers", KNOWN, indirect=True)
def test_values_and_gradients_are_those_of_the_plain_layers(layers: str) -> None:
    kinds = {kind.model_type: kind for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)}
    torch.manual_seed(0)
    config = kinds[layers](**SIZES)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made.to(device)
    assert put_scoring_head(made)
    rollouts = [
        Rollout(
            np.arange(2, length + 2, dtype=np.int32), np.arange(length) > 2, np.zeros(length, np.float32), (), "stop"
        )
        for length in (12, 5, 30)
    ]
    row = pack_row(rollouts, [0.0] * 3, pad_id=0).to(device)

    def computed() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        made.zero_grad()
        logprobs_N, entropy_N = row_logprobs(made, row, 0.7)
        (logprobs_N.sum() + entropy_N.sum()).backward()
        return logprobs_N.detach(), {name: each.grad.clone() for name, each in made.named_parameters()}

    plain_N, plain = computed()
    assert put_kernels(made, True, use_gpu=True)
    assert "Liger" in str(made), "its layers are there"
    fused_N, fused = computed()
    torch.testing.assert_close(fused_N, plain_N, rtol=1e-4, atol=1e-4)
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-3)
