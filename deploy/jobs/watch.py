"""A job is followed to its end through broken connections, and no longer than the head is silent."""

import asyncio
import time
from collections.abc import Callable

import aiohttp

from actors.deadline import aside, within
from actors.errors import RunError
from deploy.jobs.attempts import Attempt
from deploy.jobs.head import GoneError, Head, HeadError, NoAnswerError

SILENCE_S = 120.0
"""After this long without an answer of the head it is given up; the run may go on."""
_ASK_EVERY_S = 2.0
_QUIET_S = 300.0
"""A run says something more often; a connection can be lost without a word, and a new one brings what was missed."""
_REST_S = 10.0
"""For the last lines of a job that has ended."""


class Log:
    """What a job has printed, each character written once, however often it is sent from the beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    def take(self, begin: int, text: str) -> None:
        """`text` is what begins at character `begin`."""
        new = text[max(0, self._written - begin) :]
        if new:
            self._write(new)
            self._written = begin + len(text)


async def follow(head: Head, job: str, write: Callable[[str], None], silence_s: float = SILENCE_S) -> Attempt:
    """Write the job's log until it ends, and tell how; RunError when the head is silent for too long."""
    log = Log(write)
    tail = asyncio.create_task(_tail(head, job, log), name=f"log of {job}")
    heard = time.monotonic()
    try:
        while True:
            try:
                attempt = await within(silence_s, aside(head.attempt, job), f"asking for {job}")
                heard = time.monotonic()
            except GoneError:
                raise RunError(
                    f"the cluster no longer knows {job}: its head was started anew, or somebody deleted the job; what "
                    "the run has left in its run_dir stays, and the same submit command goes on from there"
                ) from None
            except (NoAnswerError, RunError) as error:
                if time.monotonic() - heard >= silence_s:
                    raise RunError(
                        f"the head has been silent for {silence_s:g} s, and {job} may go on: {error}"
                    ) from None
            else:
                if not attempt.under_way:
                    await asyncio.wait({tail}, timeout=_REST_S)
                    await _take_rest(head, job, log)
                    return attempt
            if tail.done():
                tail = asyncio.create_task(_tail(head, job, log), name=f"log of {job}")
                await asyncio.sleep(_ASK_EVERY_S)
            await asyncio.wait({tail}, timeout=_ASK_EVERY_S)
    finally:
        tail.cancel()


async def _tail(head: Head, job: str, log: Log) -> None:
    """Until the job ends, or the connection does, or seems to."""
    begin, texts = 0, head.tail(job)
    try:
        while (text := await within(_QUIET_S, anext(texts, None), f"the log of {job}")) is not None:
            log.take(begin, text)
            begin += len(text)
    except (aiohttp.ClientError, OSError, RuntimeError):
        return  # whoever follows begins again


async def _take_rest(head: Head, job: str, log: Log) -> None:
    """What a broken connection has kept back; the end of the job is known in any case."""
    try:
        log.take(0, await within(_REST_S, aside(head.log, job), f"the log of {job}"))
    except (HeadError, RunError):
        return
