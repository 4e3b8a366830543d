"""A cluster is its nodes and what each of them offers in total; reading it starts nothing."""

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Not for pools: Ray meters these in bytes and gives them to workers on its own.
_MEMORY = ("memory", "object_store_memory")


@dataclass(frozen=True)
class NodeSpec:
    """One machine; all figures are totals, whether or not something already runs there."""

    name: str
    cpus: float
    gpus: int
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels."""
    node_id: str = ""
    """Ray's id of it; empty for a node that is not there yet."""


@dataclass(frozen=True)
class ClusterSpec:
    """The nodes that a plan may use; names are distinct."""

    nodes: tuple[NodeSpec, ...]

    def __post_init__(self) -> None:
        names = Counter(node.name for node in self.nodes)
        assert len(names) == len(self.nodes), f"node names are distinct, got {names}"


def from_ray(nodes: Sequence[Mapping[str, Any]]) -> ClusterSpec:
    """The living nodes of `ray.nodes()`, named by host, and by host and node id where several nodes share a host."""
    alive = [node for node in nodes if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in alive)
    return ClusterSpec(tuple(_node(node, unique=hosts[node["NodeManagerHostname"]] == 1) for node in alive))


def _node(node: Mapping[str, Any], unique: bool) -> NodeSpec:
    offered = node["Resources"]
    host = node["NodeManagerHostname"]
    return NodeSpec(
        name=host if unique else f"{host}-{node['NodeID'][:8]}",
        cpus=offered.get("CPU", 0.0),
        gpus=int(offered.get("GPU", 0)),
        resources={name: amount for name, amount in offered.items() if name not in ("CPU", "GPU", *_MEMORY)},
        labels=dict(node.get("Labels", {})),
        node_id=node["NodeID"],
    )


def uniform(num_nodes: int, cpus: float, gpus: int, labels: Sequence[Mapping[str, str]] = ()) -> ClusterSpec:
    """A cluster of equal nodes, for plans of clusters that are not there yet; the first ones bear the labels."""
    assert len(labels) <= num_nodes, "there is a node for each of the labels"
    each = [*labels, *([{}] * (num_nodes - len(labels)))]
    return ClusterSpec(tuple(NodeSpec(f"node-{index}", cpus, gpus, labels=each[index]) for index in range(num_nodes)))


def this_machine() -> ClusterSpec:
    """The machine that this runs on, as a local Ray would take it."""
    return ClusterSpec((NodeSpec(platform.node() or "localhost", float(os.cpu_count() or 1), _num_local_gpus()),))


def _num_local_gpus() -> int:
    """Visible GPUs, told by the environment or else by the driver, so that no CUDA library is loaded."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = Path("/proc/driver/nvidia/gpus")
    installed = len(list(driver.iterdir())) if driver.is_dir() else 0
    if visible is None:
        return installed
    devices = [device.strip() for device in visible.split(",")]
    # As CUDA does: the first invalid entry ends the list.
    valid = [device for device in devices if device and device != "-1"]
    return min(len(valid), installed)
