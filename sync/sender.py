"""Every policy rank takes part in the gather; rank 0 alone puts bytes on the wire, bucket by bucket."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from sync.gloo import GlooGroup
from sync.layout import Bucket, Layout, digest, pack

Gather = Callable[[tuple[str, ...]], AbstractContextManager[Mapping[str, torch.Tensor]]]
"""Makes the named parameters whole on this rank while the context is open; all ranks enter it for the same names."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What went over the wire for one version: one digest per bucket."""

    version: int
    digests: tuple[str, ...]
    num_bytes: int


class Sender:
    """Two buffers take turns: bucket n+1 is gathered and packed while bucket n is on the wire."""

    def __init__(self, layout: Layout, group: GlooGroup | None) -> None:
        """`group` is None on the ranks that only take part in the gather."""
        self._layout = layout
        self._group = group
        largest = max(bucket.num_bytes for bucket in layout.buckets)
        self._buffers = [torch.zeros(largest, dtype=torch.uint8) for _ in range(2)] if group is not None else []

    def send(self, version: int, gather: Gather) -> Sent:
        """Stream all buckets of `version`; raises RuntimeError when the wire fails or passes its deadline."""
        if self._group is not None:
            digests = self._stream(self._group, gather)
        else:
            for bucket in self._layout.buckets:
                with gather(_names(bucket)):
                    pass
            digests = []
        return Sent(version, tuple(digests), self._layout.num_bytes)

    def _stream(self, group: GlooGroup, gather: Gather) -> list[str]:
        digests: list[str] = []
        on_wire: list[Future[None] | None] = [None] * len(self._buffers)
        with ThreadPoolExecutor(1, thread_name_prefix="weights-wire") as wire:
            for index, bucket in enumerate(self._layout.buckets):
                turn = index % len(self._buffers)
                _landed(on_wire[turn])  # its buffer is free again
                with gather(_names(bucket)) as tensors:
                    payload = pack(bucket, tensors, self._buffers[turn])
                digests.append(digest(bucket, payload))
                on_wire[turn] = wire.submit(group.broadcast, payload)
            for future in on_wire:
                _landed(future)
        return digests


def _landed(future: Future[None] | None) -> None:
    if future is not None:
        future.result()  # the broadcast has its own deadline


def _names(bucket: Bucket) -> tuple[str, ...]:
    return tuple(placed.parameter.name for placed in bucket.tensors)
