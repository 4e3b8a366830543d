"""Adapters alone are trained and travel; merged they are the plain model, and peft reads what is left of them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.load import load_causal_lm, load_skeleton
from actors.model.lora import (
    adapt,
    merged,
    save_adapter,
    sources,
    target_modules,
    trained_parameters,
    without_adapter,
)
from actors.model.quantize import merge_over, quantization
from actors.objective import Objective
from actors.recipe.policy import LoraConfig
from algorithms.packed import pack_row
from sync.layout import parameters_of, plan_layout
from tests.actors.test_policy import rollouts

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LORA = LoraConfig(r=4, lora_alpha=6)
IDS = torch.arange(40, 60)[None]


def plain(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


def adapted(path: Path, config: LoraConfig = LORA) -> PreTrainedModel:
    """With adapters that add something."""
    model = plain(path)
    adapt(model, config)
    torch.manual_seed(3)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def plainly(model: PreTrainedModel, config: LoraConfig = LORA) -> dict[str, torch.Tensor]:
    """The merged weights, as they are saved."""
    parameters = dict(model.named_parameters())
    scaling = config.lora_alpha / config.r
    return {name: merged([parameters[part] for part in parts], scaling) for name, parts in sources(parameters).items()}


def test_a_new_adapter_adds_nothing(tiny_models: dict[str, Path]) -> None:
    before, model = plain(tiny_models["tied"]), plain(tiny_models["tied"])
    adapt(model, LORA)
    assert torch.equal(model(IDS).logits, before(IDS).logits)


def test_without_its_adapter_a_model_is_its_base(tiny_models: dict[str, Path]) -> None:
    """To the bit; and afterwards the adapter is what it was, and as trainable."""
    base, model = plain(tiny_models["untied"])(IDS).logits, adapted(tiny_models["untied"]).eval()
    before, trained = model(IDS).logits, [p.requires_grad for p in model.parameters()]
    assert not torch.allclose(before, base, atol=1e-3)
    with without_adapter(model):
        assert torch.equal(model(IDS).logits, base)
        assert [p.requires_grad for p in model.parameters()] == trained
    assert torch.equal(model(IDS).logits, before)


def test_the_reference_below_an_adapter_is_as_a_worker_would_compute_it(tiny_models: dict[str, Path]) -> None:
    """Not those that came with the rollouts count, and training goes on as if nobody had asked."""
    model = load_causal_lm(str(tiny_models["tied"]), None, False, "float32", attn_implementation=PACKED_ATTENTION)
    row = pack_row(rollouts(), [0.0] * len(rollouts()), 0)
    with torch.no_grad():
        expected_N, _ = row_logprobs(model, row, 0.7)
    adapt(model, LORA)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    referred = Objective(None, 0.7, 16, reference_below=True).referred(model, row)
    assert referred.reference_logprobs_N is not None
    assert torch.equal(referred.reference_logprobs_N, expected_N)
    assert model.training
    assert not referred.reference_logprobs_N.requires_grad
    assert Objective(None, 0.7, 16).referred(model, row) is row


@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "q_proj")])
def test_only_adapters_are_trained_and_travel(tiny_models: dict[str, Path], targets) -> None:
    model = adapted(tiny_models["untied"], LoraConfig(r=4, target_modules=targets))
    travelling = trained_parameters(model)
    assert {id(p) for p in travelling.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    names = ALL if targets == "all-linear" else targets
    modules = [f"self_attn.{name}" if name[0] in "qkvo" else f"mlp.{name}" for name in names]
    assert set(travelling) == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"
        for layer in range(2)
        for module in modules
        for factor in "AB"
    }


def test_the_layout_holds_the_adapter_and_no_more(tiny_models: dict[str, Path]) -> None:
    model = adapted(tiny_models["untied"])
    shapes = [(name, parameter.shape) for name, parameter in trained_parameters(model).items()]
    layout = plan_layout(parameters_of(shapes, "float32"), 2**14)
    hidden, inner = 64, 256
    in_and_out = 4 * (hidden + hidden) + 3 * (hidden + inner)
    num_bytes = sum(placed.parameter.num_bytes for bucket in layout.buckets for placed in bucket.tensors)
    assert num_bytes == 2 * LORA.r * in_and_out * 4
    assert layout.num_bytes == num_bytes, "nothing is padded at these sizes"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_packed_forward_pass_trains_adapters(tiny_models: dict[str, Path], checkpointing: bool) -> None:
    model = load_causal_lm(str(tiny_models["tied"]), None, False, "float32", attn_implementation=PACKED_ATTENTION)
    if checkpointing:
        model.gradient_checkpointing_enable()
    adapt(model, LORA)
    model.enable_input_require_grads()
    model.train()
    logprobs_N, _ = row_logprobs(model, pack_row(rollouts(), [0.0] * len(rollouts()), 0), 1.0)
    logprobs_N.sum().backward()
    adapters = trained_parameters(model)
    assert all((parameter.grad is not None) == (parameter.requires_grad) for parameter in model.parameters())
    assert all(adapters[name].grad.abs().max() > 0 for name in adapters if "lora_B" in name), "A has none: B is zero"


def test_without_adapters_all_weights_travel_under_their_own_names(tiny_models: dict[str, Path]) -> None:
    model = plain(tiny_models["tied"])
    assert trained_parameters(model) == dict(model.named_parameters())
    assert plainly(model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_merged_weights_are_the_plain_model(tiny_models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """Saved merged, and peft's own reading of the adapter over the base: the logits of the model in training."""
    import peft

    model = adapted(tiny_models[name]).eval()
    expected = model(IDS).logits
    assert not torch.allclose(expected, plain(tiny_models[name])(IDS).logits, atol=1e-3)
    model.save_pretrained(tmp_path, state_dict=plainly(model))
    assert torch.allclose(plain(tmp_path)(IDS).logits, expected, atol=1e-5)
    on_disk = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    save_adapter(model, on_disk, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(plain(tiny_models[name]), tmp_path / "adapter").eval()
    assert torch.allclose(read(IDS).logits, expected, atol=1e-5)


def test_an_adapter_merges_over_a_model_that_was_loaded_anew(tiny_models: dict[str, Path]) -> None:
    """Which is how a model is saved that is held in four bits."""
    model = adapted(tiny_models["untied"])
    whole = plain(tiny_models["untied"])
    merge_over(whole, {name: p.detach() for name, p in trained_parameters(model).items()}, LORA.lora_alpha / LORA.r)
    assert all(torch.equal(whole.get_parameter(name), weight) for name, weight in plainly(model).items())


def test_four_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.model.quantize.find_spec", lambda name: None)
    assert quantization(LORA, "bfloat16") is None
    with pytest.raises(ValueError, match=r"policy.lora.quantize: nf4 needs the package bitsandbytes.*leave quantize"):
        quantization(LoraConfig(quantize="nf4"), "bfloat16")


def test_a_merged_weight_keeps_its_dtype() -> None:
    base, a, b = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(2, 5), torch.ones(3, 2)
    assert torch.equal(merged([base, a, b], 0.5), torch.full((3, 5), 2.0, dtype=torch.bfloat16))


def test_layers_are_known_without_weights(tiny_models: dict[str, Path]) -> None:
    skeleton = load_skeleton(str(tiny_models["tied"]), None, False)
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert target_modules(skeleton, LoraConfig()) == ALL
    assert target_modules(skeleton, LoraConfig(target_modules=("v_proj", "q_proj"))) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("unknown", ["query_key_value", "lm_head", "embed_tokens", "self_attn.q_proj", "norm"])
def test_a_layer_that_cannot_be_adapted_is_named(tiny_models: dict[str, Path], unknown: str) -> None:
    with pytest.raises(
        ValueError, match=r"policy\.lora\.target_modules: .*choose from down_proj, gate_proj"
    ) as refused:
        target_modules(plain(tiny_models["untied"]), LoraConfig(target_modules=("q_proj", unknown)))
    assert repr(unknown) in str(refused.value)
