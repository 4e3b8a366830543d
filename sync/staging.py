"""A version is staged whole and verified, or the committed one is what the buffers hold again.

Without delta the committed bytes are overwritten as the next version comes (the model has them). With delta a version
is a change of the committed one: patches are applied in place and can be undone, and a bucket that comes in full comes
into fresh memory, so a version that fails takes nothing with it. Without staging a bucket's memory is given up as soon
as the follower has it, and the version is in the model before it is verified: the model must not compute meanwhile.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sync.delta import apply
from sync.frame import NUM_BYTES, Frame, Kind
from sync.layout import Layout, digest, unpack
from sync.transport import Transport, remaining_s

CPU = torch.device("cpu")


class Follower(Protocol):
    """Told on a thread of its own, in order, of bytes that are here but not yet verified."""

    def begin(self) -> None:
        """Another version is coming; forget the last one."""

    def arrived(self, tensors: dict[str, Tensor]) -> None:
        """These tensors are here; they stay as they are until the next `begin`."""


class Staging:
    """Usable without vLLM, so that the wire can be tested on its own."""

    def __init__(
        self,
        layout: Layout,
        group: Transport,
        *,
        where: torch.device | None = CPU,
        delta: bool = False,
        follower: Follower | None = None,
    ) -> None:
        """`where` is the memory that a version waits in; with None it does not, and the follower must take it all.

        With `delta` it waits on the host.
        """
        assert not delta or where == CPU, "changes are applied on the host"
        self._layout = layout
        self._group = group
        self._where = where
        self._delta = delta
        self._follower = follower
        self._buffers = [] if where is None else [_empty(bucket.num_bytes, where) for bucket in layout.buckets]
        self._landing: Tensor | None = None  # where a bucket lands that is to wait elsewhere
        self._committed: int | None = None
        self._staged: int | None = None  # verified, not committed
        self._undo: list[Callable[[], object]] = []  # from what the buffers hold back to the committed version
        self._wrong_base: int | None = None
        self._wire, self._digester, self._followed = (
            ThreadPoolExecutor(1, thread_name_prefix=f"weights-{name}") for name in ("receive", "digest", "follow")
        )
        _on_one_core(self._wire, self._followed)
        self._receiving: tuple[int, Future[list[Future[str]]]] | None = None
        self._following: list[Future[None]] = []

    def begin(self, version: int) -> None:
        """Start to receive `version` on a thread; returns at once. A version that was not committed is forgotten."""
        assert self._receiving is None, f"version {self._receiving and self._receiving[0]} was never verified"
        self._staged = None
        self._receiving = version, self._wire.submit(self._receive)

    def ready(self) -> bool:
        """Everything that was sent is here and followed up: `verify` will not wait."""
        if self._receiving is None or not self._receiving[1].done():
            return False
        if self._receiving[1].exception() is not None:
            return True  # `verify` tells
        digested = all(future.done() for future in self._receiving[1].result())
        return digested and all(future.done() for future in self._following)

    def verify(self, version: int, digests: list[str], timeout_s: float) -> None:
        """All buckets have arrived as they were sent; raises RuntimeError naming the first that did not."""
        assert self._receiving is not None, "nothing is being received"
        deadline = time.monotonic() + timeout_s
        expected, future = self._receiving
        self._receiving = None
        if expected != version:
            raise RuntimeError(f"version {version} is to be verified, but version {expected} was announced")
        received = [ours.result(remaining_s(deadline)) for ours in future.result(timeout_s)]
        damaged = [index for index, (ours, theirs) in enumerate(zip(received, digests, strict=True)) if ours != theirs]
        if damaged:
            base, committed = self._wrong_base, self._committed
            self._roll_back()
            if base is not None:
                raise RuntimeError(f"version {version} is a change of version {base}, but {committed} is held here")
            raise RuntimeError(f"version {version}: bucket {damaged[0]} of {len(digests)} arrived damaged")
        for following in self._following:
            following.result(remaining_s(deadline))
        self._staged = version

    def commit(self) -> None:
        """The verified version is the one that later changes build on."""
        assert self._staged is not None, "only a verified version is committed"
        self._committed, self._staged = self._staged, None
        self._undo.clear()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The verified version, tensor by tensor, as views of the staging buffers; nothing where there are none."""
        for bucket, buffer in zip(self._layout.buckets, self._buffers, strict=self._where is not None):
            yield from unpack(bucket, buffer)

    def close(self) -> None:
        """Leave the group; what is being received fails promptly."""
        self._group.abort()
        for thread in (self._wire, self._digester):
            thread.shutdown(wait=False, cancel_futures=True)
        # The follower's last tensors must not come after the next version's first.
        self._followed.shutdown(wait=True, cancel_futures=True)
        self._group.close()

    def _receive(self) -> list[Future[str]]:
        self._roll_back()
        self._following = [] if self._follower is None else [self._followed.submit(self._follower.begin)]
        digests: list[Future[str]] = []
        for index, bucket in enumerate(self._layout.buckets):
            if self._where is None and index >= 2:
                self._let_go(index - 2, digests)
            buffer = self._receive_bucket(index)
            digests.append(self._digester.submit(digest, bucket, buffer))
            if self._follower is not None:
                self._following.append(self._followed.submit(self._follower.arrived, dict(unpack(bucket, buffer))))
        return digests

    def _let_go(self, index: int, digests: list[Future[str]]) -> None:
        """Unstaged buckets do not pile up: two are held at a time, whatever the wire's speed."""
        digests[index].result()
        if self._follower is not None:
            self._following[1 + index].result()

    def _receive_bucket(self, index: int) -> Tensor:
        if self._delta:
            self._receive_change(index)
            return self._buffers[index]
        staged = self._where is not None
        return self._take(
            self._buffers[index] if staged else _empty(self._layout.buckets[index].num_bytes, self._group.device)
        )

    def _take(self, target: Tensor) -> Tensor:
        """Fill `target` with what comes next on the wire, wherever it lies."""
        if target.device == self._group.device:
            self._group.broadcast(target)
            return target
        if self._landing is None or self._landing.numel() < target.numel():
            self._landing = _empty(target.numel(), self._group.device)
        landed = self._landing[: target.numel()]
        self._group.broadcast(landed)
        return target.copy_(landed)

    def _receive_change(self, index: int) -> None:
        frame = Frame.from_tensor(self._take(_empty(NUM_BYTES, CPU)))
        if frame.kind is Kind.FULL:
            self._take(self._fresh(index, frame.num_bytes))
            return
        if frame.base != self._committed:
            self._wrong_base = frame.base
        if frame.kind is Kind.PATCH:
            self._apply(index, self._take(_empty(frame.num_bytes, CPU)))

    def _fresh(self, index: int, num_bytes: int) -> Tensor:
        """Memory for all bytes of a bucket."""
        before = self._buffers[index]
        if num_bytes != before.numel():
            raise RuntimeError(f"bucket {index} has {before.numel()} bytes in our layout, {num_bytes} in the sender's")
        if self._committed is not None:
            self._undo.append(partial(self._buffers.__setitem__, index, before))
            self._buffers[index] = torch.empty_like(before)
        return self._buffers[index]

    def _apply(self, index: int, patch: Tensor) -> None:
        """A patch that fits nowhere leaves the bucket as it is, and the bucket's digest tells."""
        buffer = self._buffers[index]
        try:
            undo = apply(patch, buffer)
        except ValueError:
            return
        self._undo.append(partial(apply, undo, buffer))

    def _roll_back(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._wrong_base = None


def _on_one_core(*threads: ThreadPoolExecutor) -> None:
    """Let torch work on these threads without helpers, which would stand in the way of those that generate."""
    num_threads = torch.get_num_threads()
    for thread in threads:
        thread.submit(torch.set_num_threads, 1).result()
    torch.set_num_threads(num_threads)  # it is also the default of threads to come


def _empty(num_bytes: int, device: torch.device) -> Tensor:
    """Host memory is pinned where there is a GPU to copy from it."""
    pinned = device == CPU and torch.cuda.is_available()
    return torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
