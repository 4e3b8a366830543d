"""The model below an adapter in four bits, by bitsandbytes (QLoRA, arXiv 2305.14314); run on CPUs, on no GPU yet.

Linear layers alone are quantized; embeddings, output head and norms keep the policy's dtype. What is saved is the
adapter over the model as it was, which is also what the rollout replicas compute with.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from actors.model.files import make_savable
from actors.model.load import Dtype, load_causal_lm
from actors.model.lora import ADAPTER_FOLDER, adapted_modules, factors, save_adapter
from actors.policy_calls import PolicySettings
from actors.recipe.policy import LoraConfig


def check_quantizer() -> None:
    """ValueError unless bitsandbytes can be imported here."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "policy.lora.quantize: nf4 needs the package bitsandbytes, which is not installed here; install "
            "the version in deploy/requirements/gpu_extra.txt where the policy runs, or leave quantize out"
        )


def quantization(lora: LoraConfig | None, dtype: Dtype) -> Any | None:
    """How transformers is to load the model below the adapter; None as it is."""
    if lora is None or lora.quantize is None:
        return None
    check_quantizer()
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type=lora.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Weights of four bits stay as they were made, whatever is asked of them; a model that has none is left alone.

    On CPUs with bfloat16 instructions (AVX-512) bitsandbytes packs them anew in the first pass that needs no gradient,
    as that of the reference is. From then on it computes with coarser scales, and gives no gradient to what comes
    before: training would go on, wrongly.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its Linear4bit; asking so imports nothing
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_whole(model: PreTrainedModel) -> None:
    """ValueError when the weights of the model's files are quantized: nothing can be merged into these."""
    if hasattr(model.config, "quantization_config"):
        raise ValueError(
            f"model.path: the weights of '{model.name_or_path}' are quantized already, and an adapter is merged into "
            "whole ones when it is saved; name the model that they were made of, and set policy.lora.quantize to hold "
            "it in four bits"
        )


def merge_over(model: PreTrainedModel, adapter: dict[str, torch.Tensor], scaling: float) -> None:
    """Add an adapter, by its names on the wire, to the weights of a plain model; computed in float32."""
    with torch.no_grad():
        for module in adapted_modules(adapter):
            a, b = (tensor.float() for tensor in factors(adapter, module))
            weight = model.get_parameter(f"{module}.weight")
            weight.copy_(weight.float() + scaling * (b @ a))


def save_over_the_whole(
    adapter: dict[str, torch.Tensor], trained: PreTrainedModel, settings: PolicySettings, folder: Path
) -> None:
    """Leave the adapter merged over the model as it was, and as peft takes it in a folder of its own."""
    lora = settings.policy.lora
    assert lora is not None
    dtype = settings.policy.dtype
    model = load_causal_lm(settings.model_path, settings.revision, settings.trust_remote_code, dtype)
    make_savable(model)
    merge_over(model, adapter, lora.lora_alpha / lora.r)
    model.save_pretrained(folder)
    save_adapter(trained, adapter, folder / ADAPTER_FOLDER)
