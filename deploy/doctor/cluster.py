"""Ray is reached, or starts here, and the recipe's pools fit on its nodes and into their GPUs."""

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from actors.errors import RunError
from actors.recipe.pools import used_pools
from actors.recipe.schema import Recipe
from deploy.doctor.check import Finding, passed, skipped, warned
from deploy.doctor.machine import Machine, this_machine
from deploy.memory import estimate
from deploy.nodes import LOOK_TIMEOUT_S, alive, on_nodes, unseen
from deploy.session import TOKEN_FIX, ClusterError, is_open, ray_session
from placement.cluster import ClusterSpec, from_ray
from placement.memory.accelerators import gpu_memory_gb
from placement.plan import PlacementPlan, plan

REACH_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 60.0


def reach(address: str | None, session: contextlib.ExitStack) -> Finding:
    """Joins the cluster, or starts a Ray of our own, until the session is closed; else ClusterError or RunError."""
    import ray

    began = time.monotonic()
    _enter(address, session)
    if address is None:
        return passed(f"Ray {ray.__version__} starts here in {time.monotonic() - began:.0f} s, for this user alone")
    at = ray.get_runtime_context().gcs_address
    count = len(from_ray(ray.nodes()).nodes)
    text = f"Ray {ray.__version__} at {at}: {count} node{'s' * (count != 1)}"
    if is_open(at, os.environ):
        return warned(f"{text}, and it asks for no token: whoever reaches its ports can run code there", TOKEN_FIX)
    return passed(text)


def _enter(address: str | None, session: contextlib.ExitStack) -> None:
    """Ray's own processes die with the thread that starts them (the kernel sees to it), and a check's thread ends with
    the check: so this one has a thread of its own, which stays until the session is closed."""
    reached: Future[None] = Future()
    ended = threading.Event()
    thread = threading.Thread(target=_live, args=(address, reached, ended), name="ray", daemon=True)
    thread.start()
    reached.result(REACH_TIMEOUT_S)
    session.callback(thread.join, _END_TIMEOUT_S)
    session.callback(ended.set)


def _live(address: str | None, reached: Future[None], ended: threading.Event) -> None:
    try:
        with ray_session(address, lambda _: None):  # that it is open is told by the check
            reached.set_result(None)
            ended.wait()
    except (ClusterError, RunError) as error:
        if not reached.done():
            reached.set_exception(error)


def is_reached() -> bool:
    import ray

    return bool(ray.is_initialized())


def run_a_task() -> None:
    """A worker process starts on the cluster, and answers."""
    import ray

    remote: Any = ray.remote(num_cpus=0)(_answer)
    ray.get(remote.remote(), timeout=LOOK_TIMEOUT_S)


def _answer() -> None:
    """On a worker."""


def look_at_nodes(num_ports: int) -> dict[str, Machine]:
    """Every node, by its name in plans, as it offers itself."""
    nodes = alive()
    return on_nodes({name: [num_ports] for name in nodes}, this_machine, nodes)


def nodes_that_see(probe: Path) -> dict[str, bool]:
    """By node, whether it sees the file."""
    nodes = alive()
    missing = on_nodes({name: [[str(probe.absolute())]] for name in nodes}, unseen, nodes)
    return {name: not paths for name, paths in missing.items()}


def check_placement(recipe: Recipe, cluster: ClusterSpec) -> Finding:
    """PlacementError says what is missing."""
    placed = plan(used_pools(recipe), cluster)
    pools = ", ".join(
        f"{pool} {len(bundles)} x {bundles[0].gpus} GPUs{' of the policy' * bool(bundles[0].on)}"
        if bundles[0].gpus
        else f"{pool} {len(bundles)} on CPUs"
        for pool, bundles in placed.bundles.items()
    )
    return passed(f"every worker has its place ({pools}) on {len(cluster.nodes)} node{'s' * (len(cluster.nodes) != 1)}")


def check_gpu_memory(recipe: Recipe, cluster: ClusterSpec, machines: Iterable[Machine]) -> Finding:
    """MemoryShortageError says what does not fit, and the knob that makes it fit."""
    placed = plan(used_pools(recipe), cluster)
    used = {bundle.node for bundles in placed.bundles.values() for bundle in bundles if bundle.gpus}
    if not used:
        return skipped("no worker has a GPU")
    sizes = [size for machine in machines for size in machine.gpus_gb]
    found = estimate(recipe, placed, cluster, min(sizes, default=None))
    text = ". ".join(found.lines) or "not estimated: a tiny model"
    if found.table is None:
        return skipped(text)
    if not sizes and any(gpu_memory_gb(node) is None for node in cluster.nodes if node.name in used):
        return skipped("how much memory its GPUs have is not known; python -m deploy plan takes --gpu-memory-gb")
    return passed(f"{text}. By formulas that have not been held against a GPU yet")


def workers_of(placed: PlacementPlan | None) -> tuple[Counter[str], Counter[str]]:
    """How many workers, and how many engines, each node has."""
    if placed is None:
        return Counter(), Counter()
    workers = Counter(bundle.node for bundles in placed.bundles.values() for bundle in bundles)
    return workers, Counter(bundle.node for bundle in placed.bundles.get("rollout", ()))
