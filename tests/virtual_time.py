"""Sleeping takes no time, and the order of events follows from the seconds that were asked for alone.

On a busy machine two timers that are a millisecond apart may come together, and some task that was ready in time comes
late. In this loop the clock stands while there is anything to do, and jumps to the next timer when there is not. For
coroutines that wait for each other and for timers; whoever waits for a thread or a process needs true time.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Nobody waits: what would have been waited is added up."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing is left to do, and nobody sleeps: a deadlock"
        self.waited_s += max(0.0, timeout)
        return super().select(0.0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._passed = _Selector()
        super().__init__(self._passed)

    def time(self) -> float:
        return self._passed.waited_s


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns or raises, and always by the same way."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)
