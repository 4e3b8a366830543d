"""A version sent whole and as its adapter alone: real tensors of both, over the same wire to a second process."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from actors.model.lora import adapt, trained_parameters
from actors.recipe.policy import LoraConfig
from benchmarks.weight_sync_engine import model_config
from benchmarks.weight_sync_wire import open_wire
from sync.layout import parameters_of

LORA = LoraConfig(r=16)
NUM_RUNS = 9


@dataclass(frozen=True, slots=True)
class LoraFigures:
    """Bytes that went over the wire for a version, and median seconds until it was verified."""

    num_bytes: int
    seconds: float
    full_bytes: int
    full_s: float

    @property
    def share(self) -> float:
        return self.num_bytes / self.full_bytes


def measure() -> LoraFigures:
    from transformers import Qwen3ForCausalLM

    untyped: Any = Qwen3ForCausalLM
    torch.manual_seed(0)
    model = untyped(model_config()).bfloat16()
    full = _published(dict(model.named_parameters()))
    adapt(model, LORA)
    return LoraFigures(*_published(trained_parameters(model)), *full)


def _published(tensors: dict[str, Tensor]) -> tuple[int, float]:
    parameters = parameters_of(((name, tensor.shape) for name, tensor in tensors.items()), "bfloat16")
    with open_wire(parameters) as wire:
        wire.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        sent = wire.publish()  # not timed: it touches the memory
        seconds = []
        for _ in range(NUM_RUNS):
            started = time.perf_counter()
            sent = wire.publish()
            seconds.append(time.perf_counter() - started)
        assert wire.same()
        return sent.num_bytes, median(seconds)
