"""The model below an adapter in four bits, by bitsandbytes (QLoRA, arXiv 2305.14314); not run on a GPU yet.

Linear layers alone are quantized; embeddings, output head and norms keep the policy's dtype. What is saved is the
adapter over the model as it was, which is also what the rollout replicas compute with.
"""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from actors.model.load import Dtype
from actors.model.lora import adapted_modules, factors
from actors.recipe.policy import LoraConfig


def check_quantizer() -> None:
    """ValueError unless bitsandbytes can be imported here."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "policy.lora.quantize: nf4 needs the package bitsandbytes, which is not installed here; install "
            "deploy/requirements/gpu_extra.txt where the policy runs, or leave quantize out"
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


def merge_over(model: PreTrainedModel, adapter: dict[str, torch.Tensor], scaling: float) -> None:
    """Add an adapter, by its names on the wire, to the weights of a plain model; computed in float32."""
    with torch.no_grad():
        for module in adapted_modules(adapter):
            a, b = (tensor.float() for tensor in factors(adapter, module))
            weight = model.get_parameter(f"{module}.weight")
            weight.copy_(weight.float() + scaling * (b @ a))
