"""What Ray says of a worker whose process has gone is told from what a call has raised in one that lives."""

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

# Ray's memory monitor kills a worker to save its machine; Ray then tells of that, and not of a dead actor.
_DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError, LocalRayletDiedError)


def is_death(error: BaseException) -> bool:
    """Whether the worker that was called is gone, as far as Ray knows.

    A task error that is of its cause's type as well is none: it is about somebody behind the worker, who lives.
    """
    return isinstance(error, _DEATHS) and not isinstance(error, RayTaskError)
