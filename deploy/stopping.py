"""SIGTERM is heard in every phase of a command: one that stopped can be given again, and says so.

While a run trains, the signal is the loop's (actors/run/signals.py). Before and after that it raises SystemExit with
the signal's number, so that whatever was started is ended on the way out. When Ray is joined it puts a handler of its
own in the place of this one, which does the same, but aborts the process 3 s later, whatever that does meanwhile
(`disarmed`); so `listen` again then.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from actors.errors import StoppedError, first_cause, last_line

_FAILED_ON_THE_WAY_OUT = "unhandled exception during asyncio.run() shutdown"
"""asyncio's own words for it."""


@contextmanager
def heard() -> Iterator[None]:
    """StoppedError when SIGTERM has ended what was done inside, and no run was there to say more about it."""
    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        yield
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        raise StoppedError(
            "stopped; the same command goes on from the newest checkpoint, or begins anew where there is none"
        ) from None
    finally:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # else the process ends with what it has said
            signal.signal(signal.SIGTERM, before)


@contextmanager
def disarmed() -> Iterator[None]:
    """Before Ray's own handler of SIGTERM raises SystemExit it sets an alarm, which would abort the process 3 s later:
    that is taken back, so that what was started can be ended on the way out."""
    try:
        yield
    except SystemExit:
        signal.alarm(0)
        raise


def listen() -> None:
    """From here on SIGTERM raises SystemExit with its number."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))


def nothing_left() -> None:
    """All runs have come to their end: that Ray and this process are ended, too, is no longer to be stopped."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_to_end(coroutine: Coroutine[Any, Any, None], say: Callable[[str], None]) -> None:
    """On an event loop, to its end. What fails when it has been told to stop already is said in a line; asyncio would
    write a traceback."""

    def told(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context["message"] == _FAILED_ON_THE_WAY_OUT:
            say(f"warning: while it stopped: {last_line(first_cause(context['exception']))}")
        else:
            loop.default_exception_handler(context)

    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(told)
        runner.run(coroutine)
