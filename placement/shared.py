"""Whoever shares a GPU is told which it is: those of a bundle are asked for once, before anybody is on it.

A bundle keeps its GPUs as long as its machine is there, so whoever is built again finds them. One that Ray has moved to
another machine has others, which nobody can ask for while somebody is on it: that is an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.config import HOST
from placement.home import NODE_ID
from placement.plan import Bundle, PlacementError, PlacementPlan


@dataclass(frozen=True)
class Place:
    """Where a worker of the policy is."""

    node_id: str
    devices: tuple[str, ...]
    """Its GPUs, as CUDA names them."""


def shared_places(plan: PlacementPlan, groups: Sequence[PlacementGroup], timeout_s: float) -> dict[int, Place]:
    """Of the policy's workers on whose GPUs others lie, before they are started; nothing where nobody does.

    `groups`: of the policy, one for each worker. PlacementError when a worker would lie on two machines.
    """
    guests = [bundle for bundles in plan.bundles.values() for bundle in bundles if bundle.on and bundle.gpus]
    hosts = sorted({host for bundle in guests for host in bundle.on})
    remote: Any = ray.remote(num_cpus=0, max_retries=3)(_place)
    asking = [
        remote.options(
            num_gpus=plan.bundles[HOST][host].gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(groups[host], placement_group_bundle_index=0),
        ).remote()
        for host in hosts
    ]
    try:
        places = dict(zip(hosts, ray.get(asking, timeout=timeout_s), strict=True)) if hosts else {}
    except RayError as error:
        raise PlacementError(f"which GPUs the policy has was not told within {timeout_s:g} s: {error}") from error
    for bundle in guests:
        if len({places[host].node_id for host in bundle.on}) > 1:
            raise PlacementError(
                f"pool {bundle.pool!r}: worker {bundle.worker} would lie on two machines, those of the policy's "
                f"workers {bundle.on[0]} to {bundle.on[-1]}; set pools.{bundle.pool}.gpus_per_worker=1, or bind the "
                "policy to nodes that hold a whole number of them"
            )
    return places


def check_place(bundle: Bundle, places: Mapping[int, Place], groups: Sequence[PlacementGroup]) -> None:
    """PlacementError when the GPUs of the policy that a worker lies on are not there any more; asks Ray."""
    nodes = {host: placement_group_table(groups[host])["bundles_to_node_id"].get(0) for host in bundle.on}
    moved = [host for host in bundle.on if nodes[host] != places[host].node_id]
    if moved:
        raise PlacementError(
            f"pool {bundle.pool!r}: worker {bundle.worker} lies on the GPUs of the policy's worker {moved[0]}, whose "
            "machine is gone; give the command again, and both are placed anew"
        )


def environment(bundle: Bundle, places: Mapping[int, Place]) -> dict[str, str]:
    """What a worker that lies on the policy's GPUs is told of them."""
    devices = ",".join(device for host in bundle.on for device in places[host].devices)
    return {"CUDA_VISIBLE_DEVICES": devices, NODE_ID: places[bundle.on[0]].node_id}


def _place() -> Place:
    return Place(ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids())))
