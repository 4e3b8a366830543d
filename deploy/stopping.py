"""SIGTERM is heard in every phase of a command: one that stopped can be given again, and says so.

While a run trains, the signal is the loop's (actors/run/signals.py). Before and after that it raises SystemExit with
the signal's number, so that whatever was started is ended on the way out: here, and in the handler that Ray puts in the
place of this one when it is joined.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from actors.errors import StoppedError


@contextmanager
def heard() -> Iterator[None]:
    """StoppedError when SIGTERM has ended what was done inside, and no run was there to say more about it."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        yield
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise
        raise StoppedError(
            "stopped; the same command goes on from the newest checkpoint, or begins anew where there is none"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def nothing_left() -> None:
    """All runs have come to their end: that Ray is ended, too, is no longer to be stopped."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
