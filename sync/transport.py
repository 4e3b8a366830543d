"""Every operation on a wire ends: done, or in a WireError by its deadline. One interface, two implementations.

Rank 0 opens a rendezvous and passes its ticket to the other ranks by whatever road they share; then all ranks join:

    opened = open_wire("gloo", host, timeout_s)                         # rank 0
    wire = join(opened, 0, world_size, host, device, timeout_s)
    wire = join(ticket, rank, world_size, host, device, timeout_s)      # the others, at the same time
"""

import base64
import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed import TCPStore

Kind = Literal["gloo", "nccl"]
Reason = Literal["peer gone", "deadline passed", "aborted", "async error", "closed"]
T = TypeVar("T")


class WireError(RuntimeError):
    """An operation of `rank` failed, and so will all later ones: close the transport and make a new one."""

    def __init__(self, rank: int, operation: str, reason: Reason, detail: str = "") -> None:
        super().__init__(rank, operation, reason, detail)  # all of them, so that it survives pickling
        self.rank = rank
        self.operation = operation
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.operation}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Transport(Protocol):
    """A member of one group; all members make the same broadcasts in the same order, one at a time."""

    rank: int
    world_size: int
    device: torch.device
    """Where tensors must lie: cpu for gloo, cuda:n for nccl."""

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Send (`root`) or fill (others) a contiguous tensor of any dtype; returns when this rank's part is done.

        Raises WireError by the deadline. Nothing writes to the tensor after that.
        """

    def abort(self) -> None:
        """From any thread, any number of times: an operation in progress here raises promptly, later ones at once."""

    def close(self) -> None:
        """Free sockets, threads and communicator, any number of times; when every member's last operation is done."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a rank must know to join; plain text, so any road will do."""

    kind: Kind
    address: str
    """gloo: host:port of the store; nccl: the 128-byte unique id in base64."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Rank 0's end of a rendezvous, which it joins with; `store` serves the others for as long as it is held."""

    ticket: Ticket
    store: TCPStore | None = None


def open_wire(kind: Kind, host: str, timeout_s: float) -> Opened:
    """A rendezvous at this process, whose own address is `host`.

    nccl raises RuntimeError where cupy or a GPU is missing.
    """
    match kind:
        case "gloo":
            from sync.gloo import open_store

            store = open_store(host, timeout_s)
            return Opened(Ticket(kind, f"{host}:{store.port}"), store)
        case "nccl":
            from sync.nccl import make_unique_id

            return Opened(Ticket(kind, base64.b64encode(make_unique_id()).decode()))


def join(
    rendezvous: Opened | Ticket,
    rank: int,
    world_size: int,
    host: str,
    device: torch.device,
    timeout_s: float,
    fanout: int | None = None,
) -> Transport:
    """Become member `rank`; returns when all are there and raises WireError when they are not within `timeout_s`.

    `host` is this process's own address (gloo binds to it), `timeout_s` also the deadline of each later operation.
    With a `fanout`, the same on all ranks, gloo's members pass tensors on to so many others each, from rank 0 down.
    """
    ticket, store = (rendezvous, None) if isinstance(rendezvous, Ticket) else (rendezvous.ticket, rendezvous.store)
    match ticket.kind:
        case "gloo":
            from sync.gloo import GROUP, GlooGroup, reach_store
            from sync.relay import RelayGroup

            assert device.type == "cpu", f"gloo carries host memory, not {device}"
            deadline = time.monotonic() + timeout_s
            if store is None:
                store_host, _, port = ticket.address.rpartition(":")
                store = reach_store(store_host, int(port), rank, timeout_s)
            join_s = remaining_s(deadline)
            if fanout is None:
                return GlooGroup(store, GROUP, rank, world_size, host, timeout_s, join_s)
            return RelayGroup(store, GROUP, rank, world_size, host, timeout_s, fanout, join_s=join_s)
        case "nccl":
            from sync.nccl import NcclGroup

            assert fanout is None, "nccl pipelines its broadcast through all members by itself"
            return NcclGroup(base64.b64decode(ticket.address), rank, world_size, device, timeout_s)


def as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor's own memory as flat uint8: bits travel, so every dtype does."""
    assert tensor.is_contiguous(), "only contiguous tensors travel"
    assert tensor.device == device, f"the tensor lies on {tensor.device}, the transport carries {device}"
    return tensor.detach().reshape(-1).view(torch.uint8)


def within(call: Callable[[], T], discard: Callable[[T], None], timeout_s: float, name: str) -> T:
    """What `call` returns, or TimeoutError at the deadline even if it blocks in C for ever.

    It runs on a daemon thread of its own, which nothing can end: a result that comes too late is discarded there.
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  the caller's to handle
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                answer.set_exception(error)
            return
        try:
            answer.set_result(result)
        except InvalidStateError:
            discard(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        return answer.result(timeout_s)
    except FutureTimeoutError:
        if answer.cancel():
            raise TimeoutError(f"{timeout_s:g} s") from None
        return answer.result()  # it came, or failed, in the last moment


def remaining_s(deadline: float) -> float:
    """Seconds from now until a time.monotonic() moment, at least 0."""
    return max(0.0, deadline - time.monotonic())
