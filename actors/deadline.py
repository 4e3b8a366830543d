"""Every wait has a deadline and a name."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class DeadlineError(RuntimeError):
    """Something took longer than its deadline; the message says what and how long."""


async def within(seconds: float, awaitable: Awaitable[T], what: str) -> T:
    """Await for at most `seconds`; raises DeadlineError naming `what`."""
    try:
        async with asyncio.timeout(seconds):
            return await awaitable
    except TimeoutError as error:
        raise DeadlineError(f"{what} took longer than {seconds:g} s") from error
