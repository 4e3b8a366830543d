"""A running vLLM model goes from one version to the next between two steps, in the time that it takes to flip pointers.

The first version goes through vLLM's layerwise reload, and what vLLM's weight loaders do with each tensor is recorded.
Later versions replay that: on CPUs, where vLLM packs weights into copies of its own, into a second set of weights that
is built as the tensors arrive, while generation goes on, and takes the first one's place at the swap; on GPUs straight
into the parameters, during the swap. A model with layers that the recording does not cover, such as quantized ones or
experts, is reloaded by vLLM each time.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sync.reload import Reload


@dataclass(frozen=True, slots=True)
class Load:
    """One call of a weight loader: `loader(parameter of layer, tensor called name, *args, **kwargs)`."""

    layer: nn.Module
    parameter: str
    name: str
    loader: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Part:
    """A layer that holds weights, the loads that fill it, and its next weights."""

    layer: nn.Module
    loads: list[Load] = field(default_factory=list)
    packing: list[nn.Module] = field(default_factory=list)
    """Layers that keep a packed copy of this layer's weight: itself, or an output head tied to it."""
    spare: dict[str, Tensor] = field(default_factory=dict)
    """By parameter: what the model held before, and holds next."""
    packed: list[Any] = field(default_factory=list)
    """One for each of `packing`."""

    @property
    def names(self) -> set[str]:
        return {load.name for load in self.loads}


class ServingModel:
    """`begin` and `arrived` are called while the model generates, `swap` while it does not."""

    def __init__(self, model: Any, model_config: Any) -> None:
        self._model = model
        self._reloading = Reload(model, model_config)
        self._on_cpu = next(model.parameters()).device.type == "cpu"
        self._parts: list[Part] | None = None  # None: unknown, or not covered
        self._tensors: dict[str, Tensor] = {}
        self._waiting: list[Part] = []
        self._scratch: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._building = threading.Lock()  # a group that was left may be at a last layer when the next one begins

    def begin(self) -> None:
        """Forget what was built."""
        with self._building:
            self._tensors = {}
            self._waiting = list(self._parts) if self._parts is not None and self._on_cpu else []

    def arrived(self, tensors: dict[str, Tensor]) -> None:
        """Build the layers of which all tensors are here."""
        with self._building, torch.no_grad():
            self._tensors |= tensors
            complete = [part for part in self._waiting if part.names <= self._tensors.keys()]
            self._waiting = [part for part in self._waiting if not part.names <= self._tensors.keys()]
            for part in complete:
                self._build(part)

    def swap(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The model computes with these tensors, the ones that arrived, when this returns."""
        with torch.no_grad():
            if self._parts is None:
                self._reload(dict(tensors))
            elif self._on_cpu:
                assert not self._waiting, "every layer is built before the swap"
                for part in self._parts:
                    _flip(part)
            else:
                received = dict(tensors)
                for part in self._parts:
                    _load(part, dict(part.layer.named_parameters(recurse=False)), received)

    def _build(self, part: Part) -> None:
        targets = {name: self._target(part, name) for name in {load.parameter for load in part.loads}}
        _load(part, targets, self._tensors)
        part.packed.clear()
        for layer in part.packing:
            stand_in: Any = SimpleNamespace(weight=targets["weight"], bias=targets.get("bias"))
            quant_method: Any = layer.quant_method
            quant_method.process_weights_after_loading(stand_in)
            part.packed.append(stand_in.cpu_linear)

    def _target(self, part: Part, name: str) -> Tensor:
        """A parameter to load into: like the layer's own, or, where vLLM keeps the packed copy alone, as loaded."""
        own = part.layer.get_parameter(name)
        if own.numel():
            if name not in part.spare:
                part.spare[name] = torch.empty_like(own.data)
            return _dressed(part.spare[name], own)
        like = _as_loaded(part.layer)[name]
        key = like.shape, like.dtype
        if key not in self._scratch:
            self._scratch[key] = torch.empty(like.shape, dtype=like.dtype)
        return _dressed(self._scratch[key], like)

    def _reload(self, tensors: dict[str, Tensor]) -> None:
        device = next(self._model.parameters()).device
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._reloading.begin()
        loads = _record(self._model, {id(tensor): name for name, tensor in on_device.items()})
        self._reloading.arrived(on_device)
        self._reloading.swap()
        self._parts = _parts(self._model, loads)


def _record(model: nn.Module, names: dict[int, str]) -> list[Load | None]:
    """What the weight loaders are called with from now on; None for a call that cannot be replayed."""
    loads: list[Load | None] = []

    def recording(layer: nn.Module, parameter: str, load: Any) -> Callable[..., object]:
        original = load
        while original.__name__ == "online_process_loader":
            original = original.__wrapped__

        @functools.wraps(load)  # vLLM knows its own wrappers by their name
        def record(*args: Any, **kwargs: Any) -> object:
            name = names.get(id(args[1])) if len(args) >= 2 else None
            loads.append(Load(layer, parameter, name, original, args[2:], kwargs) if name is not None else None)
            return load(*args, **kwargs)

        return record

    for layer in model.modules():
        for parameter, value in layer.named_parameters(recurse=False):
            if (load := getattr(value, "weight_loader", None)) is not None:
                value.weight_loader = recording(layer, parameter, load)  # type: ignore[attr-defined]
    return loads


def _parts(model: nn.Module, loads: list[Load | None]) -> list[Part] | None:
    """The model's layers and how each is filled; None when a layer needs more than that."""
    parts: dict[nn.Module, Part] = {}
    for load in loads:
        if load is None:
            return None
        parts.setdefault(load.layer, Part(load.layer)).loads.append(load)
    filled = {id(load.layer.get_parameter(load.parameter)) for load in loads if load is not None}
    if not all(_is_covered(layer, filled) for layer in model.modules()):
        return None
    for part in parts.values():
        part.packing = _packing(model, part.layer)
    return list(parts.values())


def _is_covered(layer: nn.Module, filled: set[int]) -> bool:
    """All of the layer's parameters are loaded, and vLLM does nothing with them but to pack matrices on the CPU."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    own = dict(layer.named_parameters(recurse=False))
    if type(layer) is Attention:
        return not own
    if hasattr(layer, "process_weights_after_loading") or getattr(layer, "_cpu_skip_gemm_dispatch", False):
        return False
    method = getattr(layer, "quant_method", None)
    if method is not None and type(method) not in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
        return False
    as_loaded = _as_loaded(layer)
    for name, value in own.items():
        like = as_loaded.get(name, value)
        only_packed = value.numel() == 0 and name == "weight" and hasattr(layer, "cpu_linear") and like.ndim == 2
        as_it_was = value.shape == like.shape and (value.dtype == like.dtype or name == "bias")
        if id(value) not in filled or not (only_packed or as_it_was):
            return False
    return True


def _packing(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The layers that compute with a packed copy of `layer`'s weight.

    vLLM packs every embedding, but only that of an output head is computed with.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    sharing = [m for m in model.modules() if weight is not None and m._parameters.get("weight") is weight]
    packed = [m for m in sharing if hasattr(m, "cpu_linear")]
    if not any(isinstance(m, ParallelLMHead) for m in model.modules()):
        return packed
    return [m for m in packed if not isinstance(m, VocabParallelEmbedding) or isinstance(m, ParallelLMHead)]


def _load(part: Part, targets: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for load in part.loads:
        load.loader(targets[load.parameter], tensors[load.name], *load.args, **load.kwargs)


def _flip(part: Part) -> None:
    for name, spare in part.spare.items():
        own = part.layer.get_parameter(name)
        own.data, part.spare[name] = spare, own.data
    for layer, packed in zip(part.packing, part.packed, strict=True):
        layer.cpu_linear = packed
    part.packed.clear()


def _as_loaded(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's parameters as weights are loaded into them, on the meta device."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    parameters: dict[str, Tensor] = get_layerwise_info(layer).restore_metadata[0]
    return parameters


def _dressed(data: Tensor, like: Tensor) -> Tensor:
    """`data` with the class and attributes of a vLLM parameter, which its weight loader asks for."""
    target = data.detach()
    target.__class__ = like.__class__
    target.__dict__ = like.__dict__.copy()
    return target
