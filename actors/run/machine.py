"""A run ends within seconds of the death of Ray's own process on its machine, and says so.

Nothing can be started through it any more, and every worker would be waited for until a deadline of its own.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, NoReturn

import ray

from actors.deadline import DeadlineError, aside, within
from actors.errors import RunError
from actors.recipe.upkeep import LivenessConfig


@contextlib.asynccontextmanager
async def machine_watched(config: LivenessConfig) -> AsyncIterator[None]:
    """RunError, in a group, when the cluster has given up the machine of this process while the context is open."""
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(_watch(ray.get_runtime_context().get_node_id(), config), name="watch the machine")
        yield
        watch.cancel()


async def _watch(node: str, config: LivenessConfig) -> NoReturn:
    while True:
        await asyncio.sleep(config.every_s)
        nodes: list[dict[str, Any]] = []
        with contextlib.suppress(DeadlineError):  # the cluster's head is away: Ray itself waits for it, and ends us
            nodes = await within(config.timeout_s, aside(ray.nodes), "the list of the machines")
        if is_given_up(node, nodes):
            raise RunError(
                "Ray's own process on this machine (the raylet) has died, and with it the workers here; give the same "
                "command again"
            )


def is_given_up(node: str, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether `ray.nodes()` says that the machine with this id is dead; one that it does not know may be new."""
    return any(other["NodeID"] == node and not other["Alive"] for other in nodes)
