"""A call of reward functions ends by its deadline; a child that failed is dead with its whole process group."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rewards.pipe import receive, send

WITHHELD = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "WANDB_API_KEY")
"""Ours alone. All else in the environment a reward may need: the key of a judge's service, a token of the hub."""

_ROOT = Path(__file__).resolve().parents[2]
_KILL_TIMEOUT_S = 10.0
_EXIT_GRACE_S = 0.5
"""A child whose pipe has closed is given this long to end by itself, so that its own exit status can be named."""


class ChildError(RuntimeError):
    """The child gave no answer: `timeout`, `died`, or `exception` when it could not load its functions."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call of one function gave: a score or None per completion, and why scores are missing."""

    scores: tuple[float | None, ...]
    cause: str | None = None
    """None, `timeout`, `exception`, `died` or `bad_output`."""
    detail: str = ""


class RewardProcess:
    """At most one child at a time, started when it is needed; used from one thread.

    The thread that starts the child must live as long as the child may: the kernel kills the child with that thread.
    """

    def __init__(self, functions: tuple[str, ...], columns: tuple[str, ...] | None = None) -> None:
        self._functions = functions
        self._columns = columns
        self._child: _Child | None = None
        self._num_requests = 0
        self._interrupted = False
        self.is_async: tuple[bool, ...] = ()
        """Which of the functions are async; known after the first start."""

    def start(self, timeout_s: float) -> None:
        """Returns when a child has loaded all functions; ChildError when it cannot."""
        if self._child is not None and not _has_exited(self._child.process):
            return
        self.kill()
        self._child = _spawn(self._functions, self._columns)
        if self._interrupted:
            raise self._ended("died", "the process was interrupted")
        answer = self._answer(time.monotonic() + timeout_s, f"loading took more than {timeout_s:g} s")
        if "error" in answer:
            self.kill()
            raise ChildError("exception", answer["error"])
        self.is_async = tuple(answer["is_async"])

    def call(self, functions: Sequence[int], arguments: str, timeout_s: float) -> list[Outcome]:
        """Outcomes of some functions on JSON `arguments`, called together; ChildError when they share one failure."""
        assert self._child is not None, "start() comes first"
        self._num_requests += 1
        request = f'{{"id": {self._num_requests}, "functions": {list(functions)}, "arguments": {arguments}}}'
        deadline = time.monotonic() + timeout_s
        answer = self._answer(deadline, f"took more than {timeout_s:g} s", request.encode())
        if answer.get("id") != self._num_requests:
            raise self._ended("died", "it wrote into the pipe of the reward process")
        return [Outcome(tuple(r["scores"]), r["cause"], r["detail"]) for r in answer["results"]]

    def interrupt(self) -> None:
        """End the call in progress for good, from any thread: the child dies, and every call raises ChildError."""
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
        child.process.wait(_KILL_TIMEOUT_S)
        os.close(child.request_fd)
        os.close(child.response_fd)

    def _answer(self, deadline: float, late: str, request: bytes | None = None) -> dict[str, Any]:
        """The child's next message, after `request` was sent; ChildError (and no child) when there is none."""
        child = self._child
        assert child is not None
        try:
            if request is not None:
                send(child.request_fd, request, deadline)
            answer: dict[str, Any] = json.loads(receive(child.response_fd, deadline))
            return answer
        except TimeoutError:
            # A process that the child forked may hold the pipe open after the child has died.
            raise self._ended("died" if _has_exited(child.process) else "timeout", late) from None
        except EOFError:
            raise self._ended("died", "it closed the pipe of the reward process") from None
        except ValueError:
            raise self._ended("died", "it wrote into the pipe of the reward process") from None

    def _ended(self, cause: str, detail: str) -> ChildError:
        child = self._child
        assert child is not None
        if cause == "died" and _exits_soon(child.process):
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


def _spawn(functions: tuple[str, ...], columns: tuple[str, ...] | None) -> _Child:
    """A child in a session (and process group) of its own, tied to us by two pipes that nobody else has."""
    child_reads, request_fd = os.pipe()
    response_fd, child_writes = os.pipe()
    for descriptor in (request_fd, response_fd):
        os.set_blocking(descriptor, False)
    numbers = (str(child_reads), str(child_writes), str(os.getpid()))
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name not in WITHHELD}
    process = subprocess.Popen(
        [sys.executable, "-m", "actors.rewards.child", *numbers, json.dumps(columns), *functions],
        pass_fds=(child_reads, child_writes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # a function that prints without end must neither block nor fill a disk
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**inherited, "PYTHONPATH": os.pathsep.join(paths)},
    )
    os.close(child_reads)
    os.close(child_writes)
    return _Child(process, request_fd, response_fd)


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
