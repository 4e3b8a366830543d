"""A broadcast group over TCP in which every operation ends or fails by its deadline.

It stands on its own TCPStore and ProcessGroupGloo, apart from torch.distributed's default group, so one process can
be in several (DeepSpeed's among them) and a group can be made anew after a failure.

ProcessGroupGloo (torch 2.13) has no abort, and a payload that is on the wire when its connection breaks is never told:
gloo's thread waits on until gloo's own time-out. So the caller waits in short slices, looks in between whether it was
aborted and whether every peer is still connected, and on failure closes all connections: gloo writes nothing more.
"""

import contextlib
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from sync.transport import Reason, WireError, as_bytes, remaining_s, within

GROUP = "wire"
"""The one group that the store of a ticket serves."""
_BACKLOG = 2048
"""Members that may knock at the rendezvous at the same time."""
_SLICE_S = 0.05
_PROBE_S = 0.5
_PROBE_TAG, _SEVER_TAG, _SLICE_TAG = 1, 2, 3
_LARGE, _NUM_POSTED = 4 * 2**20, 12
"""Bytes of a slice of a large payload, and how many are under way; measured on 2 cores."""
_DECORATION = re.compile(r"\[\S+\.cc:\d+\] |\. This is typically caused by.*", re.DOTALL)
_TIMED_OUT = re.compile("timed? ?out", re.IGNORECASE)


class GlooGroup:
    """A member of the group: `broadcast` sends from the root (rank 0) to all others."""

    def __init__(
        self,
        store: TCPStore,
        group: str,
        rank: int,
        world_size: int,
        host: str,
        timeout_s: float,
        join_s: float | None = None,
    ) -> None:
        """Returns when all members have joined; WireError when they have not within `join_s`, or else `timeout_s`."""
        join_s = timeout_s if join_s is None else join_s
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device("cpu")
        self._timeout_s = timeout_s
        self._failure: tuple[Reason, str] | None = None
        self._work: Any = None
        self._group: Any = None
        try:
            self._group = within(
                lambda: _connect(store, group, rank, world_size, host, join_s), _drop, join_s, "gloo-join"
            )
        except (RuntimeError, TimeoutError) as error:
            raise WireError(rank, f"joining {world_size} ranks", reason_of(error), words_of(error)) from None
        self._store: TCPStore | None = store  # closes with the last reference

    @classmethod
    def join(
        cls, store_host: str, store_port: int, group: str, rank: int, world_size: int, host: str, timeout_s: float
    ) -> Self:
        """Join the group whose store is served at `store_host`; `host` is this process's own address."""
        deadline = time.monotonic() + timeout_s
        store = reach_store(store_host, store_port, rank, timeout_s)
        return cls(store, group, rank, world_size, host, timeout_s, remaining_s(deadline))

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Send (`root`) or fill (others) `tensor`; raises WireError when a peer is gone or the deadline passes."""
        payload = as_bytes(tensor, self.device)
        operation = f"broadcast of {payload.numel()} bytes from rank {root}"
        if self._failure is None and payload.numel() > 0:
            self._attempt(payload, root)
        if self._failure is not None:
            raise WireError(self.rank, operation, *self._failure)

    def abort(self) -> None:
        """Release an operation in progress within a slice, refuse later ones, and close all connections."""
        self._fail("aborted", "")

    def close(self) -> None:
        """Free sockets and threads: at once, or after a failure in mid-payload when gloo's own time-out has passed."""
        self._failure = self._failure or ("closed", "")
        if self._work is not None and not self._work.is_completed():
            # Freeing the group now would wait for gloo's thread, in the caller's time.
            held = (self._group, self._store, self._work)
            threading.Thread(target=_free_when_done, args=held, name="gloo-close", daemon=True).start()
        self._group = self._store = self._work = None

    def _attempt(self, payload: Tensor, root: int) -> None:
        """Leaves what went wrong in `_failure`; the exception itself would keep its frames, and so gloo, alive."""
        try:
            self._work = self._start(payload, root)
            if self._wait(self._work):
                self._work = None
        except (RuntimeError, TimeoutError) as error:
            self._fail(reason_of(error), words_of(error))

    def _start(self, payload: Tensor, root: int) -> Any:
        if self.world_size == 2 and payload.numel() > _LARGE:
            return _Sliced(self._group, payload, 1 - self.rank, self.rank == root, self._timeout_s)
        options = BroadcastOptions()
        options.rootRank = root
        options.timeout = timedelta(seconds=self._timeout_s)
        return self._group.broadcast([payload], options)

    def _wait(self, work: Any) -> bool:
        """True when `work` is done, False soon after it was aborted; raises at the deadline or when a peer is gone."""
        deadline = time.monotonic() + self._timeout_s
        next_probe = time.monotonic() + _PROBE_S
        while not _done_within(work, min(_SLICE_S, remaining_s(deadline))):
            now = time.monotonic()
            if self._failure is not None:
                return False
            if now >= deadline:
                raise TimeoutError(f"{self._timeout_s:g} s")
            if now >= next_probe:
                self._probe()
                next_probe = now + _PROBE_S
        return True

    def _probe(self) -> None:
        """Raise RuntimeError when a peer's connection is closed; posting a message that nobody will take tells."""
        for peer in self._peers():
            try:
                self._group.send([torch.zeros(1, dtype=torch.uint8)], peer, _PROBE_TAG)
            except RuntimeError as error:
                raise RuntimeError(f"rank {peer}: {words_of(error)}") from error

    def _fail(self, reason: Reason, detail: str) -> None:
        """The first failure is the cause of all that follow."""
        if self._failure is None:
            self._failure = reason, detail
            self._sever()

    def _sever(self) -> None:
        """Close all connections: gloo does so itself when any operation times out, so let one do that."""
        group = self._group
        for peer in self._peers() if group is not None else ():
            with contextlib.suppress(RuntimeError):
                group.recv([torch.zeros(1, dtype=torch.uint8)], peer, _SEVER_TAG).wait(timedelta(milliseconds=1))

    def _peers(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]


class _Sliced:
    """A large payload between two members, faster than gloo's own broadcast, which makes one copy after the other.

    Several slices are posted at once, so both ends copy all the time. It is waited for as gloo's work is.
    """

    def __init__(self, group: Any, payload: Tensor, peer: int, sends: bool, timeout_s: float) -> None:
        # What went wrong, as text: an exception that is kept would keep its frames, and so gloo's objects, alive.
        self._done: Future[str | None] = Future()
        post = group.send if sends else group.recv
        slices = payload.split(_LARGE)
        run = threading.Thread(target=self._run, args=(post, slices, peer, timeout_s), name="gloo-slices", daemon=True)
        run.start()

    def is_completed(self) -> bool:
        return self._done.done()

    def wait(self, timeout: timedelta | None = None) -> None:
        """RuntimeError when it has failed, or is not done by then."""
        try:
            failure = self._done.result(None if timeout is None else timeout.total_seconds())
        except FutureTimeoutError:
            failure = "not done yet"
        if failure is not None:
            raise RuntimeError(failure)

    def _run(self, post: Any, slices: Sequence[Tensor], peer: int, timeout_s: float) -> None:
        posted: deque[Any] = deque()
        timeout = timedelta(seconds=timeout_s)
        try:
            for piece in slices:
                if len(posted) == _NUM_POSTED:
                    posted.popleft().wait(timeout)
                posted.append(post([piece], peer, _SLICE_TAG))
            while posted:
                posted.popleft().wait(timeout)
        except RuntimeError as error:
            self._done.set_result(str(error))
        else:
            self._done.set_result(None)


def open_store(host: str, timeout_s: float) -> TCPStore:
    """The rendezvous of a group, served by this process on a free port of `host` and of no other address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.create_server((host, 0), family=family, backlog=_BACKLOG)  # the store's own would be open to all
    port = door.getsockname()[1]
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=door.detach())


def reach_store(host: str, port: int, rank: int, timeout_s: float) -> TCPStore:
    """The rendezvous that another process serves; WireError of `rank` when it does not answer in time."""
    timeout = timedelta(seconds=timeout_s)
    try:
        return within(lambda: TCPStore(host, port, None, False, timeout), _drop, timeout_s, "gloo-store")
    except (RuntimeError, TimeoutError) as error:
        what = f"reaching the store at {host}:{port}"
        raise WireError(rank, what, reason_of(error), words_of(error)) from None


def _connect(store: TCPStore, group: str, rank: int, world_size: int, host: str, timeout_s: float) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    # Bind to the address that the others reach; the default resolves the host name, which containers often lack.
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    return ProcessGroupGloo(PrefixStore(group, store), rank, world_size, options)


def _free_when_done(group: object, store: object, work: Any) -> None:
    """Frees them by returning. It sleeps in Python, since a daemon thread inside C++ makes a process's exit abort."""
    while not work.is_completed():
        time.sleep(_SLICE_S)


def _done_within(work: Any, seconds: float) -> bool:
    """Whether the operation has ended by then; raises RuntimeError when it has failed."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False  # that was only our slice
        work.wait()
    return True


def reason_of(error: Exception) -> Reason:
    """gloo and the store tell by their words alone."""
    timed_out = isinstance(error, TimeoutError) or _TIMED_OUT.search(str(error)) is not None
    return "deadline passed" if timed_out else "peer gone"


def words_of(error: Exception) -> str:
    """gloo's message without the place in gloo's sources and its advice."""
    return _DECORATION.sub("", str(error)).strip()


def _drop(_: object) -> None:
    """A member that came too late: freed with its last reference."""
