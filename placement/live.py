"""The plan of a live cluster is one that can be granted at once, if there is any.

On a cluster where nothing else runs it is the plan that `python -m deploy plan --address` shows. Of replicas that come
and go it has as many as there is room for.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import ray
from ray._private.state import available_resources_per_node

from placement.cluster import ClusterSpec, from_ray
from placement.config import PoolConfig
from placement.plan import PlacementError, PlacementPlan, plan, ten_thousandths
from placement.seats import resources_of

_SETTLE_S = 2.0
"""What has just been given back is free after some moments."""
_LOOK_S = 0.1


def plan_now(pools: Mapping[str, PoolConfig], fewer: Iterable[Mapping[str, PoolConfig]] = ()) -> PlacementPlan:
    """The plan of the whole cluster, or of what others leave of it where they hold what that needs.

    Where they leave too little it is that of the first of `fewer` that can be granted at once; when none can, the plan
    of the last on the whole cluster, which can be waited for. PlacementError when even an idle cluster were too small.
    """
    cluster = from_ray(ray.nodes())
    deadline = time.monotonic() + _SETTLE_S
    *many, last = [pools, *fewer]
    for some in many:
        with contextlib.suppress(PlacementError):
            planned, at_once = _best(some, cluster, deadline)
            if at_once:
                return planned
    return _best(last, cluster, deadline)[0]


def _best(pools: Mapping[str, PoolConfig], cluster: ClusterSpec, deadline: float) -> tuple[PlacementPlan, bool]:
    """A plan, and whether it can be granted at once."""
    planned = plan(pools, cluster)
    while not fits(planned, free := _what_is_free(cluster)):
        if time.monotonic() > deadline:
            try:
                return plan(pools, free), True
            except PlacementError:
                return planned, False
        time.sleep(_LOOK_S)
    return planned, True


def fits(planned: PlacementPlan, cluster: ClusterSpec) -> bool:
    """Whether each node has what the plan takes of it."""
    taken: dict[str, Counter[str]] = {node.name: Counter() for node in cluster.nodes}
    for bundles in planned.bundles.values():
        for bundle in bundles:
            taken[bundle.node].update({name: ten_thousandths(each) for name, each in resources_of(bundle).items()})
    return all(
        amount <= ten_thousandths({"CPU": node.cpus, "GPU": node.gpus, **node.resources}.get(name, 0.0))
        for node in cluster.nodes
        for name, amount in taken[node.name].items()
    )


def _what_is_free(cluster: ClusterSpec) -> ClusterSpec:
    """The same nodes with what nobody has reserved of them."""
    left: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    nodes = []
    for node in cluster.nodes:
        free = left.get(node.node_id, {})
        resources = {name: free.get(name, 0.0) for name in node.resources}
        nodes.append(replace(node, cpus=free.get("CPU", 0.0), gpus=int(free.get("GPU", 0)), resources=resources))
    return ClusterSpec(tuple(nodes))
