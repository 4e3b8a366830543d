"""What is run apart cannot swallow a cancellation that is meant for whoever waits for it.

A task group that is ending because of one error takes a cancellation that comes meanwhile for its own, and raises that
error alone. Whoever handles the error, and goes on, then goes on although it was told to end. (Python 3.11 leaves
`cancelling()` above 0 after some groups, so it cannot be asked either.)
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def apart(work: Coroutine[Any, Any, T], grace_s: float) -> T:
    """What `work` returns or raises, in a task of its own; when the caller is cancelled, so is the work, and then again
    each `grace_s` until it has ended, and the caller is cancelled whatever the work has raised."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=grace_s)
        if not task.cancelled():
            task.exception()  # asked for, or asyncio would say that nobody has
        raise
    return task.result()
