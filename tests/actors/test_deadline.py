"""A wait ends by its deadline, and so does the process whose thread never ends."""

import asyncio
import subprocess
import sys
import time

import pytest

from actors.deadline import DeadlineError, aside, within


async def test_a_wait_ends_by_its_deadline_and_says_for_what() -> None:
    with pytest.raises(DeadlineError, match=r"the answer took longer than 0\.05 s"):
        await within(0.05, asyncio.sleep(10), "the answer")


async def test_a_blocking_call_returns_or_raises_aside() -> None:
    assert await within(5.0, aside(divmod, 7, 2), "dividing") == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await within(5.0, aside(divmod, 7, 0), "dividing")


def test_a_blocking_call_that_hangs_does_not_keep_the_process_from_ending() -> None:
    program = (
        "import asyncio, time\n"
        "from actors.deadline import DeadlineError, aside, within\n"
        "try: asyncio.run(within(0.2, aside(time.sleep, 60), 'a disk that hangs'))\n"
        "except DeadlineError as error: print(error)\n"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert result.stdout == "a disk that hangs took longer than 0.2 s\n"
    assert time.monotonic() - started < 40.0
