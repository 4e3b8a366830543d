"""Every wait has a deadline and a name."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from actors.errors import RunError

T = TypeVar("T")


class DeadlineError(RunError):
    """Something took longer than its deadline; the message says what and how long."""


async def within(seconds: float, awaitable: Awaitable[T], what: str) -> T:
    """Await for at most `seconds`; raises DeadlineError naming `what`."""
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            return await awaitable
    except TimeoutError as error:
        if not deadline.expired():
            raise  # a time-out inside what was awaited, shorter than ours
        raise DeadlineError(f"{what} took longer than {seconds:g} s") from error


class Clock:
    """Deadlines that do not run while it stands still: whoever stops it has a deadline of his own."""

    def __init__(self) -> None:
        self._running: set[asyncio.Timeout] = set()
        self._left_s: dict[asyncio.Timeout, float] | None = None
        """While it stands still: what each deadline has left."""

    def stop(self) -> None:
        if self._left_s is None:
            self._left_s = {}
            for deadline in self._running:
                self._hold(deadline)

    def start(self) -> None:
        if self._left_s is None:
            return
        left_s, self._left_s = self._left_s, None
        now = asyncio.get_running_loop().time()
        for deadline, seconds in left_s.items():
            deadline.reschedule(now + seconds)

    async def within(self, seconds: float, awaitable: Awaitable[T], what: str) -> T:
        """Await for at most `seconds` by this clock; raises DeadlineError naming `what`."""
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                self._running.add(deadline)
                if self._left_s is not None:
                    self._hold(deadline)
                try:
                    return await awaitable
                finally:
                    self._running.discard(deadline)
                    if self._left_s is not None:
                        self._left_s.pop(deadline, None)
        except TimeoutError as error:
            if not deadline.expired():
                raise  # a time-out inside what was awaited, shorter than ours
            raise DeadlineError(f"{what} took longer than {seconds:g} s") from error

    def _hold(self, deadline: asyncio.Timeout) -> None:
        at = deadline.when()
        assert self._left_s is not None
        if at is not None and not deadline.expired():
            self._left_s[deadline] = at - asyncio.get_running_loop().time()
            deadline.reschedule(None)


async def aside(function: Callable[..., T], *arguments: Any) -> T:
    """What a blocking call returns, made on a daemon thread: one that hangs never keeps the process from ending.

    (asyncio.to_thread's threads are joined at the end of the loop and of the process, without a deadline.)
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            result = function(*arguments)
        except Exception as error:  # noqa: BLE001  the caller's to handle
            with contextlib.suppress(InvalidStateError):  # nobody waits any more
                answer.set_exception(error)
            return
        with contextlib.suppress(InvalidStateError):
            answer.set_result(result)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return await asyncio.wrap_future(answer)
