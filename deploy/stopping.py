"""SIGTERM is heard in every phase of a command: one that stopped can be given again, and says so.

While a run trains, the signal is the loop's (actors/run/signals.py). Before and after that it raises SystemExit with
the signal's number, so that whatever was started is ended on the way out. When Ray is joined it puts a handler of its
own in the place of this one, which does the same, but aborts the process 3 s later, whatever that does meanwhile
(`disarmed`); so `listen` again then.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from actors.errors import StoppedError


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
