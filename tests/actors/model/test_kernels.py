"""A model gets liger-kernel's kernels on GPUs alone, where it is known, and never those of the head and the loss."""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PreTrainedModel, Qwen3Config

from actors.model import kernels
from actors.model.kernels import KNOWN, Wish, check_kernels, put_kernels

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


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not among the CPU's requirements")
@pytest.mark.parametrize("name", KNOWN)
def test_liger_has_what_is_asked_of_it(name: str) -> None:
    import inspect

    import liger_kernel.transformers  # type: ignore[import-not-found]

    apply = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{name}")
    wanted = {"rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy", "model"}
    assert wanted <= set(inspect.signature(apply).parameters)
