"""Many tensors are copied within host memory as fast as one: the threads share out the bytes, and meet once.

torch copies one tensor after the other, and its threads meet at the end of each. Where other programs have some of the
cores, those that are done wait hundreds of times for one that is not scheduled, and burn the cores meanwhile.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_MIN_BYTES = 1 << 20
"""Less is not worth a thread."""


@dataclass(slots=True)
class HostCopies:
    """Copies that are yet to be made; until `finish` the sources must stay, and the targets hold nothing."""

    num_threads: int
    _parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, target: Tensor, source: Tensor) -> None:
        """Both in host memory, contiguous, and of one type and shape."""
        self._parts.append((target, source))

    def finish(self) -> None:
        """All targets hold what their sources hold."""
        sources = [_bytes(source) for _, source in self._parts]
        targets = [_bytes(target) for target, _ in self._parts]
        num_bytes = sum(source.size for source in sources)
        num_threads = max(1, min(self.num_threads, num_bytes // _MIN_BYTES))
        shares = [range(num_bytes * n // num_threads, num_bytes * (n + 1) // num_threads) for n in range(num_threads)]
        with ThreadPoolExecutor(num_threads, thread_name_prefix="copy") as threads:
            for copied in [threads.submit(_copy, targets, sources, share) for share in shares]:
                copied.result()
        self._parts.clear()


def can_share(target: Tensor, source: Tensor) -> bool:
    """Whether HostCopies may take it."""
    alike = target.dtype == source.dtype and target.shape == source.shape
    return alike and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (target, source))


def _copy(targets: list[np.ndarray], sources: list[np.ndarray], share: range) -> None:
    """The bytes of `share`, counted through all tensors; numpy lets the other threads run meanwhile."""
    for place, part in _parts_of(sources, share):
        np.copyto(targets[place][part], sources[place][part])


def _parts_of(sources: list[np.ndarray], share: range) -> Iterator[tuple[int, slice]]:
    first = 0
    for place, source in enumerate(sources):
        start, stop = max(share.start - first, 0), min(share.stop - first, source.size)
        if start < stop:
            yield place, slice(start, stop)
        first += source.size


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
