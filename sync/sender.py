"""Every policy rank takes part in the gather; rank 0 alone puts bytes on the wire, bucket by bucket."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sync.changes import Changes
from sync.layout import Bucket, Layout, digest, pack, whole
from sync.transport import Transport

Gather = Callable[[tuple[str, ...]], AbstractContextManager[Mapping[str, Tensor]]]
"""Makes the named parameters whole on this rank while the context is open; all ranks enter and leave it for the same
names in the same order. Two are open at a time, and the first to be opened is the first to be closed."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What went over the wire for one version: one digest per bucket."""

    version: int
    digests: tuple[str, ...]
    num_bytes: int
    """On the wire."""
    num_changed: int | None = None
    """Elements that differ from the version before; None for a version that was sent in full."""


class Sender:
    """Two slots take turns: bucket n+1 is gathered and packed while bucket n is on the wire and its digest is taken."""

    def __init__(self, layout: Layout, group: Transport | None, *, delta: bool = False, full_every: int = 20) -> None:
        """`group` is None on the ranks that only take part in the gather.

        With `delta` only the elements that changed travel, but for the first version of this sender and every
        `full_every`-th; it costs a host copy of the weights. The receivers must have been told so too.
        """
        self._layout = layout
        self._group = group
        self._slots = (_Slot(), _Slot())
        self._changes = Changes(len(layout.buckets), full_every) if delta and group is not None else None

    @torch.no_grad()  # also restores the mode that overlapping gathers leave behind
    def send(self, version: int, gather: Gather, full: bool = False) -> Sent:
        """Stream all buckets of `version`; raises RuntimeError when the wire fails or passes its deadline.

        `full` is for when a receiver may not hold the version that this sender sent last: after a publication that
        was not committed on every replica, or when a replica has come anew. Without delta it makes no difference.
        """
        try:
            if self._group is None:
                for index, bucket in enumerate(self._layout.buckets):
                    self._slots[index % 2].gather(gather, bucket)
                return Sent(version, (), self._layout.num_bytes)
            if self._changes is None:
                return self._stream(self._group, version, gather)
            self._changes.begin(full)
            sent = self._stream(self._group, version, gather)
            self._changes.sent(version)
            return sent
        finally:
            for slot in self._slots:
                slot.empty()

    def _stream(self, group: Transport, version: int, gather: Gather) -> Sent:
        wire = ThreadPoolExecutor(1, thread_name_prefix="weights-wire")
        digester = ThreadPoolExecutor(1, thread_name_prefix="weights-digest")
        digests: list[Future[str]] = []
        num_bytes = 0
        failure: BaseException | None = None
        with wire, digester:
            for index, bucket in enumerate(self._layout.buckets):
                slot = self._slots[index % 2]
                failure = failure or slot.landed()
                tensors = slot.gather(gather, bucket)  # of all ranks: they wait for this one, whatever the wire does
                if failure is not None:
                    continue
                payload = slot.fill(bucket, tensors, group.device)
                digests.append(digester.submit(digest, bucket, payload))
                frames = [payload] if self._changes is None else self._changes.frames(index, bucket, payload)
                num_bytes += sum(frame.numel() for frame in frames)
                slot.busy = [digests[-1], *(wire.submit(group.broadcast, frame) for frame in frames)]
            for slot in self._slots:
                failure = slot.landed() or failure
        if failure is not None:
            raise failure
        changed = self._changes.num_changed if self._changes is not None else None
        return Sent(version, tuple(future.result() for future in digests), num_bytes, changed)


@dataclass(slots=True)
class _Slot:
    """One bucket on its way: its memory belongs to the wire and to the digest until both are done with it."""

    busy: list[Future[Any]] = field(default_factory=list)
    _open: ExitStack = field(default_factory=ExitStack)
    _buffer: Tensor | None = None

    def gather(self, gather: Gather, bucket: Bucket) -> Mapping[str, Tensor]:
        """The bucket's parameters, whole; those of the slot's last bucket, which has landed, are given up first."""
        self._open.close()
        return self._open.enter_context(gather(bucket.names))

    def fill(self, bucket: Bucket, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The bucket's bytes on `device`: the parameter's own memory where possible, else packed."""
        if (payload := whole(bucket, tensors, device)) is None:
            if self._buffer is None or self._buffer.numel() < bucket.num_bytes:
                self._buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
            payload = pack(bucket, tensors, self._buffer)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the wire has a stream of its own
        return payload

    def landed(self) -> BaseException | None:
        """Wait until the bucket is where it goes, or what kept it; the broadcast has its own deadline."""
        busy, self.busy = self.busy, []
        errors = [future.exception() for future in busy]
        return next((error for error in errors if error is not None), None)

    def empty(self) -> None:
        self.busy = []
        self._open.close()
