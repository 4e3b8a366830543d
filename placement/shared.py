"""Whoever shares a GPU is told which it is: those of a bundle are asked for once, and are the same for its whole life."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.config import HOST
from placement.plan import PlacementError, PlacementPlan


def shared_devices(plan: PlacementPlan, groups: Sequence[PlacementGroup], timeout_s: float) -> dict[int, tuple[str, ...]]:
    """By worker of the policy, the GPUs of its bundle as CUDA names them; nothing where nobody shares GPUs.

    `groups`: of the policy. PlacementError when a worker would lie on two machines.
    """
    guests = [bundle for bundles in plan.bundles.values() for bundle in bundles if bundle.on and bundle.gpus]
    hosts = sorted({host for bundle in guests for host in bundle.on})
    if not hosts:
        return {}
    remote: Any = ray.remote(num_cpus=0, max_retries=3)(_devices)
    asking = [
        remote.options(
            num_gpus=plan.bundles[HOST][host].gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(groups[0], placement_group_bundle_index=host),
        ).remote()
        for host in hosts
    ]
    told = dict(zip(hosts, ray.get(asking, timeout=timeout_s), strict=True))
    for bundle in guests:
        if len({told[host][0] for host in bundle.on}) > 1:
            raise PlacementError(
                f"pool {bundle.pool!r}: worker {bundle.worker} would lie on two machines, those of the policy's workers "
                f"{bundle.on[0]} to {bundle.on[-1]}; set pools.{bundle.pool}.gpus_per_worker=1, or bind the policy to "
                "nodes that hold a whole number of them"
            )
    return {host: devices for host, (_, devices) in told.items()}


def _devices() -> tuple[str, tuple[str, ...]]:
    """The node that this runs on, and the GPUs that Ray has given it."""
    return ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))
