"""A running vLLM model goes from one version of its adapter to the next between two steps; its own weights never move.

vLLM keeps an adapter in slots beside its layers. This engine has one slot, and every request names the adapter in it by
the same id, so a swap under running requests is the filling of the slot: nothing about the requests changes. What
vLLM would read from a file is built from the tensors as they arrive, while generation goes on.
"""

import hashlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_ID = 1
_NUM_NAMED = 5
"""Tensors that a message names."""

Factor = tuple[str, bool]
"""Of which layer of the model, by vLLM's name, and whether it is A, which comes first, or B."""


def adapter_request() -> Any:
    """What every request bears; before the first version vLLM looks for a file, in vain, and serves nothing."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("published", _ID, "no file: the adapter comes by publication")


class ServingAdapter:
    """`begin` and `arrived` are called while the model generates, `swap` while it does not."""

    def __init__(self, manager: Any, r: int, lora_alpha: int) -> None:
        """`manager` is vLLM's LoRAModelManager of a worker; `r` and `lora_alpha` are peft's."""
        self._manager = manager
        self._r = r
        self._scaling = lora_alpha / r
        self._shapes = _shapes(manager, r)
        self._built: dict[Factor, Tensor] = {}
        self._building = threading.Lock()  # a group that was left may be at a last tensor when the next one begins

    def begin(self) -> None:
        """Forget what was built."""
        with self._building:
            self._built = {}

    def arrived(self, tensors: dict[str, Tensor]) -> None:
        """Build the factors; RuntimeError names the first tensor that does not fit the model."""
        with self._building, torch.no_grad():
            for name, tensor in tensors.items():
                factor = self._factor(name, tensor)
                # A copy: the staging buffers are written again, and vLLM keeps what it is given.
                copy = tensor.to(self._manager.device, self._manager.lora_config.lora_dtype, copy=True)
                self._built[factor] = copy if _is_a(factor) else copy.mul_(self._scaling)

    def swap(self, _tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The model computes with the adapter whose tensors arrived when this returns."""
        with self._building:
            if missing := [_name(factor) for factor in self._shapes if factor not in self._built]:
                named = ", ".join(missing[:_NUM_NAMED])
                raise RuntimeError(f"{len(missing)} tensors of the adapter were not among the weights sent: {named}")
            adapter = self._adapter()
        self._manager.remove_adapter(_ID)
        self._manager.add_adapter(adapter)
        self._manager.activate_adapter(_ID)

    def checksum(self) -> str:
        """Of the adapter that serves, this worker's share: what vLLM's own checksums leave out."""
        state = hashlib.sha256()
        for layer in self._manager.modules.values():
            for factor in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                state.update(factor.view(torch.uint8).cpu().numpy().data)
        return state.hexdigest()

    def _factor(self, name: str, tensor: Tensor) -> Factor:
        factor = _parsed(name, self._manager.model)
        expected = self._shapes.get(factor)
        if expected is None:
            raise RuntimeError(f"{name} was sent, but this replica's model takes no adapter there")
        if tuple(tensor.shape) != expected:
            raise RuntimeError(f"{name} was sent with shape {tuple(tensor.shape)}, but the model takes {expected}")
        return factor

    def _adapter(self) -> Any:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.lora_weights import LoRALayerWeights

        layers = dict.fromkeys(layer for layer, _ in self._shapes)
        built = self._built
        weights = {
            layer: LoRALayerWeights(layer, self._r, self._r, built[layer, True], built[layer, False], scaling=1.0)
            for layer in layers
        }
        return LoRAModel(_ID, self._r, weights)


def _shapes(manager: Any, r: int) -> dict[Factor, tuple[int, int]]:
    """Every factor that an adapter of this engine has, with its whole shape, whatever this worker's share of it is."""
    targets = set(manager.lora_config.target_modules)
    shapes: dict[Factor, tuple[int, int]] = {}
    for name, layer in manager.modules.items():
        base = layer.base_layer
        layers = manager.packed_modules.get(name, [name])  # vLLM computes some layers of the model as one
        rows = _rows(base)
        for part, num_rows in zip(layers, rows if len(layers) == len(rows) else [sum(rows)], strict=True):
            if part.rpartition(".")[2] in targets:
                shapes[part, True] = (r, base.input_size)
                shapes[part, False] = (num_rows, r)
    assert shapes, "the engine was started with layers to adapt"
    return shapes


def _rows(base: Any) -> list[int]:
    """Outputs of each of the layers that vLLM computes as one."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if isinstance(base, QKVParallelLinear):  # its own output sizes count heads that several workers hold more than once
        keys, values = base.total_num_kv_heads * base.head_size, base.total_num_kv_heads * base.v_head_size
        return [base.total_num_heads * base.head_size, keys, values]
    return list(getattr(base, "output_sizes", None) or [base.output_size])


def _parsed(name: str, model: Any) -> Factor:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    try:
        layer, is_a = parse_fine_tuned_lora_name(name, mapper.get_rename_mapper() if mapper is not None else None)
    except ValueError as error:
        raise RuntimeError(f"{name} was sent, but it is no tensor of an adapter") from error
    return layer, is_a


def _is_a(factor: Factor) -> bool:
    return factor[1]


def _name(factor: Factor) -> str:
    return f"{factor[0]}.lora_{'A' if _is_a(factor) else 'B'}.weight"
