"""Reward functions that do what they should not; the column `how` says what, so that one child sees them all."""

import asyncio
import ctypes
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from typing import Any

import numpy as np


class _Nasty(Exception):
    """Its text is longer than any pipe, and cannot be had twice."""

    def __str__(self) -> str:
        return "x" * 50_000_000


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class _Liar(list):
    """A list that does not know its own length."""

    def __len__(self) -> int:
        raise MemoryError("no length")


def _raise(error: BaseException) -> None:
    raise error


def _loop() -> None:
    while True:
        pass


def _ignore_signals_and_loop() -> None:
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    _loop()


def _fork(parent: str, child: str) -> list[float] | None:
    """Forks; then each side returns scores, exits or hangs."""
    does = parent if os.fork() else child
    if does == "exits":
        os._exit(0)
    if does == "hangs":
        time.sleep(3600)
    return [1.0, 1.0]


def _timer(handler: Any) -> list[float]:
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.3)
    return [1.0, 1.0]


def _threads() -> list[float]:
    for _ in range(50):
        threading.Thread(target=time.sleep, args=(3600,)).start()
    return [1.0, 1.0]


def _flood() -> list[float]:
    for _ in range(200):
        print("x" * 100_000)
        print("y" * 100_000, file=sys.stderr)
        os.write(1, b"z" * 100_000)
    return [1.0, 1.0]


def _subprocess() -> list[float]:
    subprocess.Popen(["sleep", "3600"])
    return [1.0, 1.0]


def _multiprocessing() -> list[float]:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    process.start()
    return [1.0, 1.0]


def _write_to_every_descriptor() -> list[float]:
    for descriptor in range(3, 4096):
        try:
            os.write(descriptor, b"\x00\x00\x00\x00\x00\x00\x00\x02{}")
        except OSError:
            continue
    return [1.0, 1.0]


def _mutate(arguments: dict[str, Any]) -> list[float]:
    for value in arguments.values():
        value.clear()
    return [1.0, 1.0]


def _leave_a_timer() -> list[float]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(1)
    return [1.0, 1.0]


def _change_everything() -> list[float]:
    os.chdir("/")
    os.environ.clear()
    random.seed(0)
    np.random.seed(0)
    sys.path.clear()
    sys.stdout = None  # type: ignore[assignment]
    return [1.0, 1.0]


def _patch_json() -> list[float]:
    json.loads = None  # type: ignore[assignment]
    return [1.0, 1.0]


def _close_event_loop() -> list[float]:
    asyncio.get_event_loop_policy().get_event_loop().close()
    return [1.0, 1.0]


def misbehave(completions: list[str], how: list[str], **kwargs: Any) -> Any:
    n, kind = len(completions), how[0]
    every = {"completions": completions, "how": how, **kwargs}
    match kind:
        case "good":
            return [1.0] * n
        # Raises.
        case "raises":
            _raise(RuntimeError("no"))
        case "raises SystemExit":
            sys.exit(0)
        case "raises KeyboardInterrupt":
            _raise(KeyboardInterrupt())
        case "raises BaseException":
            _raise(BaseException("no"))
        case "raises GeneratorExit":
            _raise(GeneratorExit())
        case "raises huge":
            _raise(_Nasty())
        case "raises unprintable":
            _raise(_Unprintable())
        case "raises an asyncio.CancelledError":
            _raise(asyncio.CancelledError())
        case "recurses for ever":
            return misbehave(completions, how, **kwargs)
        case "runs out of memory":
            return bytearray(1 << 60)
        case "raises from SIGALRM":
            return _timer(lambda *_: _raise(TimeoutError("too slow")))
        # Dies.
        case "os._exit":
            os._exit(7)
        case "segfaults":
            ctypes.string_at(0)
        case "aborts":
            os.abort()
        case "kills itself":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kills its group":
            os.killpg(0, signal.SIGKILL)
        case "is killed by SIGALRM":
            return _timer(signal.SIG_DFL)
        case "closes descriptors":
            os.closerange(3, 4096)
            return [1.0] * n
        case "writes to descriptors":
            return _write_to_every_descriptor()
        case "replaces json.loads":
            return _patch_json()
        case "forks and exits":
            return _fork("exits", "returns")
        # Hangs.
        case "loops in Python":
            _loop()
        case "loops in C":
            re.match(r"(a+)+$", "a" * 64 + "b")
        case "sleeps":
            time.sleep(3600)
        case "waits for a lock":
            threading.Lock().acquire() and threading.Event().wait()
        case "ignores all signals":
            _ignore_signals_and_loop()
        case "stops itself":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "forks and hangs":
            return _fork("hangs", "hangs")
        # Gives what is no list of scores.
        case "None":
            return None
        case "a float":
            return 1.0
        case "a str":
            return "11"
        case "a dict":
            return {0: 1.0, 1: 1.0}
        case "a generator":
            return (1.0 for _ in range(n))
        case "a coroutine function":
            return misbehave
        case "too few":
            return [1.0]
        case "too many":
            return [1.0] * (n + 1)
        case "empty":
            return []
        case "nested":
            return [[1.0]] * n
        case "strings":
            return ["1.0"] * n
        case "bools":
            return [True] * n
        case "numpy bools":
            return np.ones(n, bool)
        case "NaN":
            return [math.nan] * n
        case "infinity":
            return [math.inf] * n
        case "minus infinity":
            return np.full(n, -np.inf)
        case "huge integers":
            return [10**400] * n
        case "complex":
            return [1j] * n
        case "fractions":
            return [Fraction(1, 2)] * n
        case "a list that lies":
            return _Liar([1.0] * n)
        case "matrix":
            return np.ones((n, 2))
        # Gives scores, and does something besides.
        case "integers":
            return [1] * n
        case "tuple":
            return (1.0,) * n
        case "numpy array":
            return np.ones(n, np.float32)
        case "numpy scalars":
            return [np.float16(1)] * n
        case "all None":
            return [None] * n
        case "some None":
            return [None, 2.0]
        case "one NaN":
            return [math.nan, 2.0]
        case "1e308":
            return [1e308] * n
        case "floods stdout":
            return _flood()
        case "spawns threads":
            return _threads()
        case "forks and returns twice":
            return _fork("returns", "returns")
        case "forks and leaves a child":
            return _fork("returns", "hangs")
        case "starts a program":
            return _subprocess()
        case "starts a process":
            return _multiprocessing()
        case "mutates its inputs":
            return _mutate(every)
        case "leaves a timer":
            return _leave_a_timer()
        case "changes everything":
            return _change_everything()
        case "closes the event loop":
            return _close_event_loop()
        case "runs an event loop":
            return asyncio.run(_scores(n))
        case "returns an awaitable":
            return _scores(n)
    return None


async def _scores(n: int) -> list[float]:
    await asyncio.sleep(0.01)
    return [1.0] * n


async def misbehave_async(completions: list[str], how_async: list[str], **kwargs: Any) -> Any:
    n = len(completions)
    match how_async[0]:
        case "good":
            return await _scores(n)
        case "raises":
            await asyncio.sleep(0.01)
            _raise(RuntimeError("no"))
        case "raises SystemExit":
            sys.exit(1)
        case "is cancelled":
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.sleep(1)
        case "leaves a task that exits":
            asyncio.get_running_loop().create_task(_exit())
            await asyncio.sleep(0.1)
        case "never awaits":
            _loop()
        case "sleeps":
            await asyncio.sleep(3600)
        case "stops the loop":
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0.1)
        case "bad output":
            return ["1.0"] * n
    return [1.0] * n


async def _exit() -> None:
    sys.exit(1)


async def half(completions: list[str], **kwargs: Any) -> list[float]:
    """A well-behaved async function, to be gathered with the other one."""
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)


def echo(prompts: list, completions: list, completion_ids: list, **columns: Any) -> list[float]:
    """1 when the call is exactly TRL's for two completions of one conversation."""
    right = (
        prompts == [[{"role": "user", "content": "hi"}]] * 2
        and completions == [[{"role": "assistant", "content": text}] for text in ("a", "b")]
        and completion_ids == [[2, 3], [2, 3]]
        and columns == {"answer": ["x", "x"], "entry": [{"k": [1, None, 2.5]}] * 2}
        # Copies, not one object n times.
        and prompts[0] is not prompts[1]
    )
    return [float(right)] * 2


def where(completions: list[str], **kwargs: Any) -> list[float]:
    """The process it runs in, as a score."""
    return [float(os.getpid())] * len(completions)


def nothing(completions: list[str], **kwargs: Any) -> list[None]:
    return [None] * len(completions)
