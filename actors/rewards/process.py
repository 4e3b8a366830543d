"""A child that failed is dead with its whole process group; lane.py keeps the deadlines of what it is asked."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rewards.pipe import Inbox, Outbox, receive, wait_for_any

WITHHELD = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "WANDB_API_KEY")
"""Ours alone. All else in the environment a reward may need: the key of a judge's service, a token of the hub."""

CLOSED_PIPE = "it closed the pipe of the reward process"
WROTE_INTO_PIPE = "it wrote into the pipe of the reward process"

_ROOT = Path(__file__).resolve().parents[2]
_KILL_TIMEOUT_S = 10.0
_EXIT_GRACE_S = 0.5
"""A child whose pipe has closed is given this long to end by itself, so that its own exit status can be named."""


class ChildError(RuntimeError):
    """The child gave no answer: `timeout`, `died`, or `exception` when it could not load its functions."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


class RewardProcess:
    """At most one child at a time, started when it is needed; used from one thread.

    The thread that starts the child must live as long as the child may: the kernel kills the child with that thread.
    """

    def __init__(
        self,
        functions: tuple[str, ...],
        columns: tuple[str, ...] | None = None,
        max_memory_gb: float | None = None,
    ) -> None:
        self._functions = functions
        self._columns = columns
        self._memory = None if max_memory_gb is None else round(max_memory_gb * 10**9)
        self._child: _Child | None = None
        self._interrupted = False
        self.is_async: tuple[bool, ...] = ()
        """Which of the functions are async; known after the first start."""

    @property
    def is_together(self) -> bool:
        """It takes many requests at a time, answers in any order, and cancels a call when it is told to."""
        return bool(self.is_async) and all(self.is_async)

    @property
    def has_exited(self) -> bool:
        """There is none that lives; a process that it forked may hold its pipe open."""
        return self._child is None or _has_exited(self._child.process)

    def start(self, timeout_s: float) -> None:
        """Returns when a child has loaded all functions; ChildError when it cannot."""
        if not self.has_exited:
            return
        self.kill()
        try:
            self._child = child = _spawn(self._functions, self._columns, self._memory)
        except OSError as error:  # this machine has no process, or no memory, to spare
            raise ChildError("died", f"no process could be started: {error}") from error
        if self._interrupted:
            raise self.ended("died", "the process was interrupted")
        try:
            answer = json.loads(receive(child.response_fd, time.monotonic() + timeout_s))
            if "error" not in answer:
                self.is_async = tuple(answer["is_async"])
                return
        except TimeoutError:
            late = f"loading took more than {timeout_s:g} s"
            raise self.ended("died" if self.has_exited else "timeout", late) from None
        except EOFError:
            raise self.ended("died", CLOSED_PIPE) from None
        except (ValueError, TypeError, KeyError):
            raise self.ended("died", WROTE_INTO_PIPE) from None
        self.kill()
        raise ChildError("exception", answer["error"])

    def post(self, message: bytes) -> None:
        """To be sent by the next `exchange`."""
        assert self._child is not None, "start() comes first"
        self._child.outbox.put(message)

    def exchange(self, timeout_s: float, wake_fd: int) -> list[Any]:
        """Send what was posted and return what has come, as soon as there is any, or `wake_fd` can be read.

        ChildError (and no child) when none can come any more.
        """
        child = self._child
        if child is None:
            wait_for_any([wake_fd], [], timeout_s)
            return []
        try:
            writes = [] if child.outbox.flush() else [child.request_fd]
        except EOFError:  # it has ended; what it had answered before is here
            with contextlib.suppress(EOFError, ValueError):
                if messages := child.inbox.read():
                    return [json.loads(message) for message in messages]
            raise self.ended("died", CLOSED_PIPE) from None
        try:
            if child.response_fd in wait_for_any([wake_fd, child.response_fd], writes, timeout_s):
                return [json.loads(message) for message in child.inbox.read()]
        except EOFError:
            raise self.ended("died", CLOSED_PIPE) from None
        except ValueError:
            raise self.ended("died", WROTE_INTO_PIPE) from None
        return []

    def interrupt(self) -> None:
        """End what is in progress for good, from any thread: the child dies, and every call raises ChildError."""
        self._interrupted = True
        child = self._child
        if child is not None:
            _kill_group(child.process)

    def kill(self) -> None:
        """No process of the group is left; the next start() makes a new child."""
        if self._child is None:
            return
        child, self._child = self._child, None
        _kill_group(child.process)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed, and ends when the kernel lets go of it
            child.process.wait(_KILL_TIMEOUT_S)
        os.close(child.request_fd)
        os.close(child.response_fd)

    def ended(self, cause: str, detail: str) -> ChildError:
        """What to tell of a child that is no use any more, and is killed with its group."""
        child = self._child
        if child is not None and cause == "died" and _exits_soon(child.process):
            self.kill()
            status = child.process.returncode
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            return ChildError(cause, f"the process ended during the call ({how})")
        self.kill()
        return ChildError(cause, detail)


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    request_fd: int
    response_fd: int
    outbox: Outbox
    inbox: Inbox


def _spawn(functions: tuple[str, ...], columns: tuple[str, ...] | None, memory: int | None) -> _Child:
    """A child in a session (and process group) of its own, tied to us by two pipes that nobody else has."""
    child_reads, request_fd = os.pipe()
    response_fd, child_writes = os.pipe()
    for descriptor in (request_fd, response_fd):
        os.set_blocking(descriptor, False)
    numbers = (str(child_reads), str(child_writes), str(os.getpid()), json.dumps(memory))
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name not in WITHHELD}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "actors.rewards.child", *numbers, json.dumps(columns), *functions],
            pass_fds=(child_reads, child_writes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a function that prints without end must neither block nor fill a disk
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**inherited, "PYTHONPATH": os.pathsep.join(paths)},
        )
    except OSError:
        os.close(request_fd)
        os.close(response_fd)
        raise
    finally:
        os.close(child_reads)
        os.close(child_writes)
    return _Child(process, request_fd, response_fd, Outbox(request_fd), Inbox(response_fd))


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended, without reaping it: until then its process group cannot be another's."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _exits_soon(process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _EXIT_GRACE_S
    while not _has_exited(process) and time.monotonic() < deadline:
        time.sleep(0.005)
    return _has_exited(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
