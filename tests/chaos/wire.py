"""A transport at whose every bucket a fault may strike."""

from typing import Any

import torch
from torch import Tensor

from sync.transport import Transport
from tests.chaos.faults import strike


class ChaosWire:
    """Before a bucket is sent or received; a bit is flipped after."""

    def __init__(self, wire: Transport, role: str) -> None:
        self._wire = wire
        self._role = role

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        action = strike(self._role, "bucket")
        self._wire.broadcast(tensor, root)
        if action == "flip":
            tensor.view(torch.uint8)[3] ^= 16

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)
