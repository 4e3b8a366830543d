"""Where a version may travel as changes, a frame before each bucket says what comes: all bytes, a patch, or nothing."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import torch
from torch import Tensor

NUM_BYTES = 3 * 8
NO_BASE = -1


class Kind(IntEnum):
    SAME = 0
    """Not one byte has changed; no payload."""
    PATCH = 1
    FULL = 2


@dataclass(frozen=True, slots=True)
class Frame:
    """`num_bytes` of payload follow; a patch, or nothing, is to be applied to version `base`."""

    kind: Kind
    num_bytes: int
    base: int

    def to_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor([self.kind, self.num_bytes, self.base]).view(torch.uint8).to(device)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> Self:
        """RuntimeError when it is none: then nobody knows where the next bucket begins."""
        kind, num_bytes, base = tensor.cpu().view(torch.int64).tolist()
        if kind not in tuple(Kind) or num_bytes < 0:
            raise RuntimeError("a frame arrived damaged; the wire cannot be used any more")
        return cls(Kind(kind), num_bytes, base)
