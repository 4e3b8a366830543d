"""A run ends within seconds of the death of Ray's own process on its machine, or of the cluster's head, and says so.

Nothing can be started through the one any more, nor through the other, and every worker would be waited for until a
deadline of its own. Ray itself ends a process whose head is away for a minute, without a word to whoever reads ours.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, NoReturn

import psutil
import ray
import ray._private.worker

from actors.deadline import DeadlineError, aside, within
from actors.errors import RunError
from actors.recipe.upkeep import LivenessConfig

_WITH_IT = ", and with it the workers here; give the same command again"
_HEAD_AWAY_S = 20.0
"""A head that is away for less may come back; Ray gives it 60 s, after which nothing can be said any more."""
_KNOCK_EVERY_S = 5.0
_KNOCK_TIMEOUT_S = 3.0
_LAST_KNOCK_TIMEOUT_S = 1.0


@contextlib.asynccontextmanager
async def machine_watched(config: LivenessConfig, say: Callable[[str], None]) -> AsyncIterator[None]:
    """RunError, in a group, when the cluster has lost its head, or given up the machine of this process, meanwhile."""
    context = ray.get_runtime_context()
    raylet = raylet_pid()
    async with asyncio.TaskGroup() as tasks:
        watches = [
            tasks.create_task(_watch_machine(context.get_node_id(), config), name="watch the machine"),
            tasks.create_task(_watch_head(context.gcs_address, config, say), name="watch the head"),
        ]
        if raylet is not None:
            watching = _watch_raylet(raylet, context.gcs_address, say)
            watches.append(tasks.create_task(watching, name="watch the raylet"))
        yield
        for watch in watches:
            watch.cancel()


async def _watch_raylet(pid: int, head: str, say: Callable[[str], None]) -> NoReturn:
    """Told by the kernel, and said at once: the next call of ours to a raylet that is gone may be the end, wordless.

    Where the head at host:port has died, too, that is the cause, and named.
    """
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    raylet, head_answers = f"Ray's own process on this machine (the raylet, process {pid})", True
    with contextlib.suppress(DeadlineError):
        head_answers = await within(_LAST_KNOCK_TIMEOUT_S, aside(answers, head), f"knocking at {head}")
    why = f"{raylet} has died{_WITH_IT}"
    if not head_answers:
        why = f"the head of the Ray cluster, {head}, is gone, and with it {raylet}; give the same command again when "
        why += "there is a cluster"
    say(f"error: {why}")
    raise RunError(why)


def raylet_pid() -> int | None:
    """Of Ray's own process on this machine; None where it is not to be seen."""
    node = ray._private.worker.global_worker.node
    named = None if node is None else f"--raylet_socket_name={node.raylet_socket_name}"
    for process in psutil.process_iter(["cmdline"]):
        if named in (process.info["cmdline"] or ()):
            return int(process.pid)
    return None


async def _watch_machine(node: str, config: LivenessConfig) -> NoReturn:
    while True:
        await asyncio.sleep(config.every_s)
        nodes: list[dict[str, Any]] = []
        with contextlib.suppress(DeadlineError):  # the head is away: that is the other watch's
            nodes = await within(config.timeout_s, aside(ray.nodes), "the list of the machines")
        if is_given_up(node, nodes):
            raise RunError(f"Ray's own process on this machine (the raylet of node {node[:8]}) has died{_WITH_IT}")


async def _watch_head(address: str, config: LivenessConfig, say: Callable[[str], None]) -> NoReturn:
    heard = time.monotonic()
    while True:
        await asyncio.sleep(min(config.every_s, _KNOCK_EVERY_S))
        heard_now = False
        with contextlib.suppress(DeadlineError):  # no answer either; this machine may have been busy
            heard_now = await within(2 * _KNOCK_TIMEOUT_S, aside(answers, address), f"knocking at {address}")
        if heard_now:
            heard = time.monotonic()
        elif time.monotonic() - heard > _HEAD_AWAY_S:
            why = (
                f"the head of the Ray cluster, {address}, is gone: nobody has answered there for {_HEAD_AWAY_S:g} s; "
                "give the same command again when there is a cluster"
            )
            say(f"error: {why}")  # at once: to close what the cluster held may take longer than Ray lets us live
            raise RunError(why)


def answers(address: str) -> bool:
    """Whether somebody listens at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def is_given_up(node: str, nodes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether `ray.nodes()` says that the machine with this id is dead; one that it does not know may be new."""
    return any(other["NodeID"] == node and not other["Alive"] for other in nodes)
