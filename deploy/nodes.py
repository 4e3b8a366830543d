"""One function on many nodes of a cluster, and whether they see the files that are written here.

Workers of the nodes import this file: it loads nothing that takes time.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.errors import RunError, last_line
from placement.cluster import from_ray

LOOK_TIMEOUT_S = 120.0
"""A node may have to unpack the working directory and start a process first."""
_SETTLE_S = 5.0
"""A network's file system may show a new file to others a moment later."""
T = TypeVar("T")


def alive() -> dict[str, Mapping[str, Any]]:
    """The nodes that Ray knows to be alive, by their names in plans."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return dict(zip([spec.name for spec in from_ray(nodes).nodes], nodes, strict=True))


def on_nodes(
    calls: Mapping[str, Sequence[Any]], function: Callable[..., T], nodes: Mapping[str, Mapping[str, Any]]
) -> dict[str, T]:
    """What the function gives on each node for that node's arguments; nodes that die meanwhile are left out.

    RunError names the node that has not answered in LOOK_TIMEOUT_S, or cannot.
    """
    deadline = time.monotonic() + LOOK_TIMEOUT_S
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    bound = {name: NodeAffinitySchedulingStrategy(nodes[name]["NodeID"], soft=False) for name in calls}
    asked = {name: remote.options(scheduling_strategy=bound[name]).remote(*calls[name]) for name in calls}
    answers = {}
    for name, answer in asked.items():
        try:
            answers[name] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except (NodeDiedError, TaskUnschedulableError):
            continue
        except GetTimeoutError:
            raise RunError(f"node {name} has not answered in {LOOK_TIMEOUT_S:g} s; see whether it hangs") from None
        except RayError as error:
            raise RunError(f"node {name} runs none of our functions: {last_line(error)}") from None
    return answers


def unseen(paths: Sequence[str]) -> list[str]:
    """On a node: those of the paths that are not there."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        missing = [path for path in paths if not Path(path).exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.5)


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextlib.contextmanager
def probe_file(folder: Path) -> Iterator[Path]:
    """A file where the folder is, or is to be, for other nodes to look for."""
    probe = nearest(folder) / f".paceline-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)
