"""A broadcast group over NCCL in which every operation ends or fails by its deadline. Not run on two GPUs yet.

NCCL itself waits for a dead peer for ever. So a watchdog thread, the only one to touch the communicator's state, polls
NCCL's asynchronous errors and the deadline, and aborts the communicator: kernels and blocked calls then end.
cupy lends its binding of NCCL only; streams and events are torch's. Nothing here needs cupy or a GPU to be imported.
"""

import contextlib
import threading
import time
from typing import Any

import torch
from torch import Tensor

from sync.transport import Reason, WireError, as_bytes, within

_POLL_S = 0.1
_SETTLE_S = 1.0


class NcclGroup:
    """A member of the group on one GPU; NCCL refuses two members on the same one."""

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
        """Returns when all members have joined; raises WireError when they have not within `timeout_s`.

        A member that gives up leaves its joining thread behind, and its part of NCCL's memory: cupy's binding has no
        non-blocking initialisation (ncclConfig_t.blocking) and no communicator to abort before it returns. If the
        others come after all, the thread aborts the late communicator and ends.
        """
        self._nccl = _nccl()
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._timeout_s = timeout_s
        self._failure: tuple[Reason, str] | None = None
        self._deadline: float | None = None  # of the operation in progress
        self._trouble: tuple[Reason, str] | None = None  # asked for by abort
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._stream = torch.cuda.Stream(self.device, priority=-1)  # torch makes it non-blocking
        self._communicator: Any = self._join(unique_id)
        self._watchdog = threading.Thread(target=self._watch, name="nccl-watchdog", daemon=True)
        self._watchdog.start()

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Send (`root`) or fill (others) `tensor`; raises WireError on an error of NCCL's or when the deadline passes.

        Starts after what torch's current stream was given so far, and has ended on the device when it returns.
        """
        payload = as_bytes(tensor, self.device)
        operation = f"broadcast of {payload.numel()} bytes from rank {root}"
        if self._failure is None and payload.numel() > 0:
            self._attempt(payload, root)
        if self._failure is not None:
            raise WireError(self.rank, operation, *self._failure)

    def abort(self) -> None:
        """Let the watchdog abort the communicator; returns when it has."""
        self._ask("aborted")

    def close(self) -> None:
        """Destroy the communicator and end the watchdog."""
        self._ask("closed")
        self._watchdog.join(_SETTLE_S + self._timeout_s)

    def _join(self, unique_id: bytes) -> Any:
        def make() -> Any:
            with torch.cuda.device(self.device):
                return self._nccl.NcclCommunicator(self.world_size, unique_id, self.rank)

        operation = f"joining {self.world_size} ranks"
        try:
            return within(make, lambda late: late.abort(), self._timeout_s, "nccl-join")
        except TimeoutError as error:
            raise WireError(self.rank, operation, "deadline passed", f"{error}; a thread is left in NCCL") from None
        except RuntimeError as error:  # NcclError is one
            raise WireError(self.rank, operation, "async error", str(error)) from error

    def _attempt(self, payload: Tensor, root: int) -> None:
        """Leaves what went wrong in `_failure`."""
        done = torch.cuda.Event()
        self._deadline = time.monotonic() + self._timeout_s
        try:
            with torch.cuda.device(self.device):
                self._stream.wait_stream(torch.cuda.current_stream(self.device))
                # May block on a peer too (NCCL connects at the first call); the watchdog's abort ends that.
                pointer, stream = payload.data_ptr(), self._stream.cuda_stream
                self._communicator.broadcast(pointer, pointer, payload.numel(), self._nccl.NCCL_UINT8, root, stream)
                done.record(self._stream)
            while self._failure is None and not done.query():
                time.sleep(0.0002)
        except RuntimeError as error:
            self._ask("async error", str(error))
        finally:
            self._deadline = None
        if self._failure is not None:
            self._settle(done)

    def _settle(self, done: torch.cuda.Event) -> None:
        """Aborted kernels leave the device soon: wait for that, so that the tensor is the caller's again."""
        give_up = time.monotonic() + _SETTLE_S
        with contextlib.suppress(RuntimeError):  # of a device that is lost
            while not done.query() and time.monotonic() < give_up:
                time.sleep(0.001)

    def _ask(self, reason: Reason, detail: str = "") -> None:
        """Have the watchdog end the communicator for this reason, unless it has ended already; returns when it has."""
        self._trouble = self._trouble or (reason, detail)
        self._wake.set()
        self._stopped.wait(self._timeout_s)

    def _watch(self) -> None:
        while (trouble := self._find_trouble()) is None:
            self._wake.wait(_POLL_S)
        self._failure = trouble
        idle = self._deadline is None
        try:
            self._communicator.destroy() if trouble[0] == "closed" and idle else self._communicator.abort()
        finally:
            self._stopped.set()

    def _find_trouble(self) -> tuple[Reason, str] | None:
        deadline = self._deadline
        if self._trouble is not None:
            return self._trouble
        if deadline is not None and time.monotonic() > deadline:
            return "deadline passed", f"{self._timeout_s:g} s"
        try:
            self._communicator.check_async_error()
        except RuntimeError as error:
            return "async error", str(error)
        return None


def make_unique_id() -> bytes:
    """128 bytes by which the members find each other; the process that makes it serves them all as they join."""
    unique_id: bytes = _nccl().get_unique_id()
    return unique_id


def _nccl() -> Any:
    """cupy's binding of NCCL, or a RuntimeError that says what is missing."""
    if not torch.cuda.is_available():
        raise RuntimeError("transport nccl: this process sees no CUDA device; use gloo, or give its pool GPUs")
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise RuntimeError("transport nccl needs cupy: pip install -r deploy/requirements/gpu.txt") from error
    if not nccl.available:
        raise RuntimeError("transport nccl: cupy finds no libnccl; pip install -r deploy/requirements/gpu.txt")
    return nccl
