"""What Ray says of a worker whose process has gone is told from what a call has raised in one that lives."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

T = TypeVar("T")

_AGAIN_S = 0.5
# Ray's memory monitor kills a worker to save its machine; Ray then tells of that, and not of a dead actor.
_DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError)


def is_death(error: BaseException) -> bool:
    """Whether the worker that was called is gone, as far as Ray knows.

    A task error that is of its cause's type as well is none: it is about somebody behind the worker, who lives.
    """
    return isinstance(error, _DEATHS) and not isinstance(error, RayTaskError)


def is_out_of_reach(error: BaseException) -> bool:
    """Whether it may be the network alone: Ray has lost the connection, and does not know of a death.

    Ray says so of one that has died, too, when nobody has told it within a second or two; a ping tells which.
    """
    return isinstance(error, ActorUnavailableError) and not isinstance(error, RayTaskError)


async def sign_of_life(ping: Callable[[], Awaitable[T]]) -> T:
    """What the ping answers, which may be made any number of times; the caller sets the deadline.

    It is made again while the worker is out of reach; once Ray knows that it is dead, its error says so.
    """
    while True:
        try:
            return await ping()
        except ActorUnavailableError as error:
            if not is_out_of_reach(error):
                raise
        await asyncio.sleep(_AGAIN_S)
