"""All pools of a plan are reserved on the live cluster, or none is: then whatever was reserved is given back.

The plan proves that the pools fit; which node a bundle gets is Ray's decision.
"""

import math
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.config import HOST
from placement.elastic import num_placed
from placement.plan import PlacementError, PlacementPlan
from placement.seats import Seats, ask_for, resources_of
from placement.shared import Place, shared_places, visible_devices

_RELEASE_TIMEOUT_S = 15.0
_SETTLE_S = 2.0
"""Ray grants what there is room for at once; more time would be waiting for machines."""


@dataclass(frozen=True)
class ReservedPools:
    """One placement group for each pool; bundle i of a group belongs to worker i of the pool."""

    plan: PlacementPlan
    groups: Mapping[str, PlacementGroup]
    seats: Mapping[str, Seats] = field(default_factory=dict)
    """Of pools whose workers come and go, instead of a placement group; their workers are numbered as the seats."""
    places: Mapping[int, Place] = field(default_factory=dict)
    """Of the policy's workers with whom others share GPUs."""

    def options(self, pool: str, worker: int) -> dict[str, Any]:
        """Options with which a Ray actor fills exactly the bundle of its worker."""
        if pool in self.seats:
            return self.seats[pool].options(worker)
        bundle = self.plan.bundles[pool][worker]
        home, place = (HOST, bundle.on[0]) if bundle.on else (pool, worker)
        strategy = PlacementGroupSchedulingStrategy(self.groups[home], placement_group_bundle_index=place)
        options: dict[str, Any] = {"num_cpus": bundle.cpus, "num_gpus": bundle.own_gpus}
        if bundle.on and bundle.gpus:  # Ray leaves the variable alone where it gives no GPU
            devices = visible_devices(bundle, self.places, [self.groups[HOST]])
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": devices}}
        return options | {"scheduling_strategy": strategy}

    def release(self) -> None:
        """Give all bundles back; Ray kills the actors that are still in them.

        A cluster without its head takes nothing back, and what it held is gone with it: nobody waits for that.
        """
        giving = threading.Thread(target=self._release, name="release", daemon=True)
        giving.start()
        giving.join(_RELEASE_TIMEOUT_S)

    def _release(self) -> None:
        for group in self.groups.values():
            remove_placement_group(group)
        for seats in self.seats.values():
            seats.release()


def reserve(plan: PlacementPlan, timeout_s: float, singly: Mapping[str, int] = {}) -> ReservedPools:
    """Reserve all pools within the deadline, or none and raise a PlacementError that names those that did not fit.

    `singly`: pools whose workers come and go, and how many are wanted. As many as the plan has must fit; the others are
    asked for, and may be granted later.
    """
    deadline = time.monotonic() + timeout_s
    # The most demanding pools first, as in the plan: a small one must not split the node that a large one needs.
    placed = [pool for pool, bundles in plan.bundles.items() if not bundles[0].on]
    order = sorted(placed, key=lambda pool: -max(bundle.gpus for bundle in plan.bundles[pool]))
    with ExitStack() as undo:
        reserved: dict[str, list[PlacementGroup]] = {}
        for pool in order:
            bundles = plan.bundles[pool]
            if pool in singly:
                reserved[pool] = [ask_for(bundle) for bundle in bundles]
            else:
                resources = [resources_of(bundle) for bundle in bundles]
                group = placement_group(resources, strategy=plan.strategies[pool].upper(), name=f"paceline-{pool}")
                reserved[pool] = [group]
            for group in reserved[pool]:
                undo.callback(remove_placement_group, group)
        waits = {pool: [g.wait(_whole_seconds_until(deadline)) for g in reserved[pool]] for pool in order}
        lacking = [pool for pool in order if not all(waits[pool])]
        if lacking:
            raise PlacementError(_lack(lacking, plan, timeout_s))
        places = shared_places(plan, reserved.get(HOST, ()), timeout_s)
        undo.pop_all()
    seats = {pool: Seats(plan.bundles[pool][0], reserved[pool]) for pool in singly}
    for pool, count in singly.items():
        _ask_for_the_others(seats[pool], count)
    return ReservedPools(plan, {pool: reserved[pool][0] for pool in order if pool not in singly}, seats, places)


def _ask_for_the_others(seats: Seats, count: int) -> None:
    """Where there is room for them now, they begin with the run."""
    for _ in range(count - len(seats.numbers)):
        seats.ask()
    deadline = time.monotonic() + _SETTLE_S
    while num_placed(seats.look()) < count and time.monotonic() < deadline:
        time.sleep(0.1)


def _whole_seconds_until(deadline: float) -> int:
    """Rounded up, because Ray rounds down and would not wait at all for the last fraction of a second."""
    return max(0, math.ceil(deadline - time.monotonic()))


def _lack(pools: list[str], plan: PlacementPlan, timeout_s: float) -> str:
    """Which pools wait, and what of the cluster is left for them."""
    free, total = ray.available_resources(), ray.cluster_resources()
    left = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("GPU", "CPU"))
    waits = []
    for pool in pools:
        bundles = plan.bundles[pool]
        first = bundles[0]
        on = f" on nodes with {first.resource!r}" if first.resource else ""
        waits.append(f"pool {pool!r} ({len(bundles)} x {first.gpus} GPUs and {first.cpus:g} CPUs{on})")
    return (
        f"not reserved within {timeout_s:g} s: {', '.join(waits)}; {left} are free: stop the jobs that hold the rest "
        "(`ray status` shows them), or add nodes"
    )
