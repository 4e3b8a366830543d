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
