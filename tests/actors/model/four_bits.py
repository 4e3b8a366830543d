"""What a model of four bits stands for, and what must be left of it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from actors.model.learner import load_learner
from actors.model.lora import ADAPTER_FOLDER, adapted_modules, factors, trained_parameters
from actors.policy_calls import PolicySettings
from actors.recipe.policy import LoraConfig
from tests.actors.test_policy import settings_of

QLORA = LoraConfig(r=4, lora_alpha=6, quantize="nf4")
WHOLE = QLORA.model_copy(update={"quantize": None})


def settings(path: Path, lora: LoraConfig = QLORA) -> PolicySettings:
    return settings_of(path, path, 1, 2, "bfloat16", lora)


def learner(path: Path, lora: LoraConfig = QLORA) -> PreTrainedModel:
    """As a policy rank loads it."""
    torch.manual_seed(0)
    return load_learner(settings(path, lora))[0]


def below(model: PreTrainedModel) -> dict[str, Any]:
    """The weights below the adapters, by the names that the plain model has for them."""
    modules = adapted_modules(trained_parameters(model))
    return {f"{module}.weight": model.get_parameter(f"{module}.base_layer.weight") for module in modules}


def of_four_bits(path: Path) -> dict[str, Tensor]:
    """The weights of linear layers that four bits stand for, in bfloat16."""
    from bitsandbytes.functional import dequantize_4bit

    return {name: dequantize_4bit(weight, weight.quant_state) for name, weight in below(learner(path)).items()}


def check_merged(saved: Path, path: Path, lora: LoraConfig) -> None:
    """To the bit, the adapter that lies in the folder over the weights that the model had, and nothing else."""
    weights, whole = load_file(saved / "model.safetensors"), load_file(path / "model.safetensors")
    adapter = load_file(saved / ADAPTER_FOLDER / "adapter_model.safetensors")
    for name, weight in weights.items():
        before = whole[name].to(torch.bfloat16)
        if "_proj" in name:
            a, b = (factor.float() for factor in factors(adapter, name.removesuffix(".weight")))
            before = (before.float() + lora.lora_alpha / lora.r * (b @ a)).to(torch.bfloat16)
        assert torch.equal(weight, before), name
