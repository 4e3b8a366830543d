"""Async reward functions that do to the others in flight what they should not; the column `how` says what."""

import asyncio
import ctypes
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_in_flight = 0


async def concurrent(completions: list[str], how: list[str], **columns: Any) -> Any:
    """1 for each, after doing what the column says."""
    global _in_flight
    n, kind = len(completions), how[0]
    _in_flight += 1
    await asyncio.sleep(float(columns.get("wait_s", [0.05])[0]))  # so that all of a test are in flight together
    try:
        match kind:
            case "good":
                return [1.0] * n
            case "how many":
                return [float(_in_flight)] * n
            case "raises":
                raise RuntimeError("no")
            case "too few":
                return [1.0] * (n - 1)
            case "NaN":
                return [math.nan] * n
            case "hangs":
                await asyncio.sleep(3600)
            case "hangs, and does not let itself be cancelled":
                while True:
                    try:
                        await asyncio.sleep(3600)
                    except asyncio.CancelledError:
                        continue
            case "hangs in C":
                _hold(3600.0)
            case "loops":
                while True:
                    pass
            case "holds":
                _hold(float(columns["hold_s"][0]))
                return [1.0] * n
            case "holds and hangs":
                _note(Path(columns["calls"][0]))
                _hold(float(columns["hold_s"][0]))
                await asyncio.sleep(3600)
            case "os._exit":
                os._exit(7)
            case "segfaults":
                ctypes.string_at(0)
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "is killed once":
                _die_once(Path(columns["flag"][0]))
                return [1.0] * n
            case "writes into the pipe":
                for descriptor in range(3, 4096):
                    try:
                        os.write(descriptor, b"\x00\x00\x00\x00\x00\x00\x00\x02{}")
                    except OSError:
                        continue
                return [1.0] * n
            case "closes descriptors":
                os.closerange(3, 4096)
                return [1.0] * n
            case "stops the loop":
                asyncio.get_running_loop().stop()
                await asyncio.sleep(0.1)
            case "leaves a task that exits":
                asyncio.get_running_loop().create_task(_exit())
                await asyncio.sleep(0.1)
            case "forks and returns twice":
                os.fork()
                return [1.0] * n
            case "forks and exits":
                if os.fork():
                    os._exit(0)
                return [1.0] * n
            case "changes folder":
                os.chdir("/")
                return [1.0] * n
            case "leaves a timer":
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, 0.5)
                return [1.0] * n
            case "mutates":
                completions.clear()
                how.clear()
                return [1.0] * n
            case "is a float of its own":
                return [float(columns["own"][0])] * n
            case "a megabyte":
                return [float(len(columns["big"][0]))] * n
    finally:
        _in_flight -= 1
    return [1.0] * n


def _hold(seconds: float) -> None:
    time.sleep(seconds)


def _note(calls: Path) -> None:
    with calls.open("a", encoding="utf-8") as file:
        file.write("called\n")


def _die_once(flag: Path) -> None:
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


async def _exit() -> None:
    sys.exit(1)


async def pid(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0.05)
    return [float(os.getpid())] * len(completions)


def sync(completions: list[str], how: list[str], **columns: Any) -> list[float]:
    """1 for each, 0 when it is not called alone in its process."""
    own = f"{_in_flight} {os.getpid()} {json.dumps(how[0])}"
    if how[0] == "sync hangs":
        time.sleep(3600)
    if how[0] == "sync dies":
        os._exit(3)
    time.sleep(0.01)
    return [float(own == f"0 {os.getpid()} {json.dumps(how[0])}")] * len(completions)


async def judge(prompts: list[str], pairs: list[list[str]]) -> list[int]:
    """The longer one."""
    await asyncio.sleep(1.0)
    return [int(len(b) > len(a)) for a, b in pairs]
