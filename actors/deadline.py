"""Every wait has a deadline and a name."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

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
