"""The driver's event loop is watched from outside of it: whatever else watches a run is on that loop.

One blocking call there that never comes back (the run folder's file system hangs, or nobody reads what the run prints)
and no deadline passes any more, no stall is noticed and no SIGTERM heard. So a thread counts the loop's beats. When
they fail to come it says where the loop hangs and ends the process: what kill -9 would do, which a run survives.
"""

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from actors.run.stacks import stacks_here

_BEAT_S = 1.0
_MOST_MISSED = 300
"""Beats. The tracker's first and last words (actors/run/tracker.py), which block the loop, have less."""
_LAST_WORDS_S = 5.0
"""Whatever hangs the loop may hang these, too."""
_FAILED = 1
_STDERR = 2


@contextlib.asynccontextmanager
async def pulse_watched(stall: Path) -> AsyncIterator[None]:
    """The process ends, with stacks in `stall`, when the loop has not run for _MOST_MISSED beats meanwhile."""
    beats, over = _Beats(asyncio.get_running_loop()), threading.Event()
    loop_thread = threading.get_ident()

    def end() -> None:
        _last_words(loop_thread, stall)
        os._exit(_FAILED)

    thread = threading.Thread(target=_watch, args=(beats, over, end), name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        beats.stop()


class _Beats:
    """Counts the loop's turns, about one in _BEAT_S."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.num = 0
        self._loop = loop
        self._next = loop.call_soon(self._beat)

    def _beat(self) -> None:
        self.num += 1
        self._next = self._loop.call_later(_BEAT_S, self._beat)

    def stop(self) -> None:
        self._next.cancel()


def _watch(beats: _Beats, over: threading.Event, end: Callable[[], None]) -> None:
    """Counted, and not timed: a process that was stopped, or whose machine slept, has missed nothing."""
    missed, before = 0, -1
    while missed < _MOST_MISSED:
        if over.wait(_BEAT_S):
            return
        missed, before = (missed + 1 if beats.num == before else 0), beats.num
    end()


def _last_words(loop_thread: int, stall: Path) -> None:
    """One sentence for whoever looks, and every thread's stack in the file."""
    frame = sys._current_frames()[loop_thread]
    where = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
    told = f"error: the driver's event loop has hung for {_MOST_MISSED * _BEAT_S:g} s in {where}; see {stall}; "
    told += "give the same command again when that is mended"
    words = [
        threading.Thread(target=os.write, args=(_STDERR, f"{told}\n".encode()), daemon=True),
        threading.Thread(target=_leave, args=(stall, told), daemon=True),
    ]
    for thread in words:
        thread.start()
    for thread in words:
        thread.join(_LAST_WORDS_S)


def _leave(path: Path, told: str) -> None:
    """Even looking for the lines of source reads a disk."""
    with contextlib.suppress(OSError):
        path.write_text(f"{told}\n\n{stacks_here()}\n", encoding="utf-8")
