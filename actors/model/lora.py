"""Of a model with adapters only the adapters are trained and travel; what is saved of it is the plain model, merged.

The adapters are peft's and sit inside the model, whose own forward pass stays as it is. Names on the wire are those of
peft's files, which vLLM knows: `base_model.model.<module>.lora_A.weight`, shape (r, inputs), and `lora_B.weight`, shape
(outputs, r).
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.model.files import ADAPTER, METADATA
from actors.recipe.policy import LoraConfig

ADAPTER_FOLDER = "adapter"
_NAME = "default"  # peft's for an adapter without one
_PREFIX = "base_model.model."
_BASE = ".base_layer"
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def target_modules(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Last names of the modules that get an adapter; ValueError when the model has no such linear layer.

    The output head has none: it may be tied to the embedding, which an adapter would not follow.
    """
    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    known = sorted({name.rpartition(".")[2] for name in linear})
    if config.target_modules == "all-linear":
        return known
    unknown = [name for name in config.target_modules if name not in known]
    if unknown:
        raise ValueError(
            f"policy.lora.target_modules: this model has no linear layer named {', '.join(map(repr, unknown))} that "
            f"can be adapted; write all-linear, or choose from {', '.join(known) or 'none: it has no such layer'}"
        )
    return sorted(set(config.target_modules))


def adapt(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into the model; they add nothing yet, and nothing but them requires a gradient."""
    import peft

    settings: Any = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(model, config),
        task_type=peft.TaskType.CAUSAL_LM,
    )
    # One dtype for all parameters, as DeepSpeed wants it; its optimizers keep float32 copies of what they train.
    peft.get_peft_model(model, settings, adapter_name=_NAME, autocast_adapter_dtype=False)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what its base computes: every adapter's part is multiplied by 0.

    The adapters' modules are still called, so that ZeRO-3, which fetches weights in the order of the calls, sees the
    order that it knows; and what requires a gradient stays as it is, for DeepSpeed has hooks on it.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers, "a model without adapters has no base below them"
    for layer in layers:
        layer.set_scale(_NAME, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_NAME, 1)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained and travels, under the names that it travels by: the adapters, or all of a model without."""
    parameters = dict(model.named_parameters())
    adapters = {name: parameter for name, parameter in parameters.items() if name.endswith((_A, _B))}
    on_the_wire = {_PREFIX + name.replace(f".{_NAME}.", "."): parameter for name, parameter in adapters.items()}
    return on_the_wire or parameters


def adapted_modules(names: Iterable[str]) -> list[str]:
    """The plain model's modules that have an adapter, from its parameters' names on the wire."""
    ends = ".lora_A.weight"
    return [name.removeprefix(_PREFIX).removesuffix(ends) for name in names if name.endswith(ends)]


def factors(adapter: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    """A and B of one module, from the adapter by its names on the wire."""
    return adapter[f"{_PREFIX}{module}.lora_A.weight"], adapter[f"{_PREFIX}{module}.lora_B.weight"]


def sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each parameter of the plain model the names of those that make it: itself, or the base's, A and B.

    In the order of the names: every rank gathers them in the same one.
    """
    made: dict[str, tuple[str, ...]] = {}
    for name in names:
        stem = name.removesuffix(f"{_BASE}.weight")
        if stem != name:
            made[f"{stem}.weight"] = (name, stem + _A, stem + _B)
        elif not name.endswith((_A, _B)):
            made[name.replace(f"{_BASE}.", ".")] = (name,)
    return made


def merged(parts: Sequence[Tensor], scaling: float) -> Tensor:
    """The plain model's parameter, on the host, from the parameters that `sources` names; computed in float32."""
    base, *factors = (part.detach() for part in parts)
    if not factors:
        return base.cpu().clone()
    a, b = (factor.float() for factor in factors)
    return (base.float() + scaling * (b @ a)).to(base.dtype).cpu()


def save_adapter(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Leave the adapter as peft's `PeftModel.from_pretrained` takes it; `tensors` by their names on the wire."""
    folder.mkdir(parents=True, exist_ok=True)
    describe_adapter(model, folder)
    save_file(tensors, folder / ADAPTER, metadata=METADATA)


def describe_adapter(model: Any, folder: Path) -> None:
    """Write what peft needs to know of the adapter whose weights lie in the folder."""
    dataclasses.replace(model.peft_config[_NAME], inference_mode=True).save_pretrained(str(folder))


def base_digest(model: nn.Module) -> str:
    """Of every weight by name, as it is in memory: adapters mean something on this base alone."""
    digest = xxhash.xxh3_128()  # finds another base, not forgery
    for name, parameter in sorted(model.named_parameters()):
        for part, tensor in _held(name, parameter).items():
            digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _held(name: str, parameter: Any) -> dict[str, Tensor]:
    """The tensors that a weight is held in: itself, and what bitsandbytes multiplies its four bits by."""
    state = getattr(parameter, "quant_state", None)
    scales: dict[str, Tensor] = {} if state is None else state.as_dict(packed=True)
    return {name: parameter} | {f"{name}.{part}": tensor for part, tensor in sorted(scales.items())}


def engine_arguments(config: LoraConfig, model: PreTrainedModel) -> dict[str, Any]:
    """How a vLLM engine must be started that serves one adapter of this config on this model."""
    from vllm.config.lora import MaxLoRARanks

    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= config.r),
        "lora_target_modules": target_modules(model, config),
        "additional_config": {"adapter": {"r": config.r, "lora_alpha": config.lora_alpha}},
    }
