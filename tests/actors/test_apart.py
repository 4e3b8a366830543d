"""A cancellation reaches whoever waits, whatever the work makes of it."""

import asyncio

import pytest

from actors.apart import apart
from actors.errors import PolicyLostError


async def test_what_the_work_returns_or_raises_is_the_callers() -> None:
    async def fine() -> int:
        return 3

    async def lost() -> int:
        raise PolicyLostError("rank 0 died")

    assert await apart(fine(), 1.0) == 3
    with pytest.raises(PolicyLostError, match="rank 0 died"):
        await apart(lost(), 1.0)


@pytest.mark.parametrize("is_apart", [False, True])
async def test_work_that_swallows_a_cancellation_does_so_alone(is_apart: bool) -> None:
    """Awaited in the caller's own task, the cancellation is gone: that is what `apart` is for."""
    begun = asyncio.Event()

    async def swallowing() -> None:
        try:
            begun.set()
            await asyncio.sleep(60.0)
        except asyncio.CancelledError:
            raise PolicyLostError("at the same moment") from None

    async def caller() -> str:
        try:
            await (apart(swallowing(), 1.0) if is_apart else swallowing())
        except PolicyLostError:
            return "went on"
        return "ended"

    task = asyncio.create_task(caller())
    await begun.wait()
    task.cancel()
    await asyncio.wait({task}, timeout=5.0)
    assert task.done()
    assert task.cancelled() is is_apart


async def test_work_that_goes_on_is_told_again() -> None:
    told = 0
    begun = asyncio.Event()

    async def stubborn() -> None:
        nonlocal told
        begun.set()
        while told < 3:
            try:
                await asyncio.sleep(60.0)
            except asyncio.CancelledError:
                told += 1

    task = asyncio.create_task(apart(stubborn(), grace_s=0.01))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told == 3
