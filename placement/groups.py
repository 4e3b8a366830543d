"""All pools of a plan are reserved on the live cluster where the plan puts them, or none is.

Each bundle has a placement group of its own, with its planned node as the target: Ray puts it there iff there is room
when it is asked for, and live.py plans on what is free.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.cluster import from_ray
from placement.config import HOST
from placement.elastic import Place, num_placed
from placement.plan import Bundle, PlacementError, PlacementPlan
from placement.seats import Seats, ask_for
from placement.shared import Place as Home
from placement.shared import check_place, environment, shared_places

_RELEASE_TIMEOUT_S = 15.0
_SETTLE_S = 2.0
"""Ray grants what there is room for at once; more time would be waiting for machines."""


@dataclass(frozen=True)
class Singly:
    """Of a pool whose workers come and go, how many it begins with."""

    least: int
    wanted: int


@dataclass(frozen=True)
class ReservedPools:
    """One placement group for each worker of each pool."""

    plan: PlacementPlan
    """As Ray has placed it."""
    groups: Mapping[str, tuple[PlacementGroup, ...]]
    seats: Mapping[str, Seats] = field(default_factory=dict)
    """Of pools whose workers come and go, instead of such groups; their workers are numbered as the seats."""
    strays: tuple[str, ...] = ()
    """Which workers lie elsewhere than they were planned: a sentence for each."""
    places: Mapping[int, Home] = field(default_factory=dict)
    """Of the policy's workers with whom others share GPUs."""

    def options(self, pool: str, worker: int) -> dict[str, Any]:
        """Options with which a Ray actor fills exactly the bundle of its worker."""
        if pool in self.seats:
            return self.seats[pool].options(worker)
        bundle = self.plan.bundles[pool][worker]
        home, place = (HOST, bundle.on[0]) if bundle.on else (pool, worker)
        strategy = PlacementGroupSchedulingStrategy(self.groups[home][place], placement_group_bundle_index=0)
        options: dict[str, Any] = {"num_cpus": bundle.cpus, "num_gpus": bundle.own_gpus}
        if bundle.on and bundle.gpus:  # Ray leaves the variable alone where it gives no GPU
            options["runtime_env"] = {"env_vars": environment(bundle, self.places)}
        return options | {"scheduling_strategy": strategy}

    def check(self, pool: str, worker: int) -> None:
        """PlacementError when the GPUs that the worker shares are gone with their machine: nobody can be built there
        again. Asks Ray, which may take a while."""
        bundle = self.plan.bundles[pool][worker]
        if bundle.on and bundle.gpus:
            check_place(bundle, self.places, self.groups[HOST])

    def release(self) -> None:
        """Give all bundles back; Ray kills the actors that are still in them.

        A cluster without its head takes nothing back, and what it held is gone with it: nobody waits for that.
        """
        giving = threading.Thread(target=self._release, name="release", daemon=True)
        giving.start()
        giving.join(_RELEASE_TIMEOUT_S)

    def _release(self) -> None:
        for groups in self.groups.values():
            for group in groups:
                remove_placement_group(group)
        for seats in self.seats.values():
            seats.release()


def reserve(planned: PlacementPlan, timeout_s: float, singly: Mapping[str, Singly] = {}) -> ReservedPools:
    """Reserve all pools within the deadline, or none and raise a PlacementError that names what did not fit.

    `singly`: pools whose workers come and go. The fewest must fit, where the plan has them; the others are asked for,
    those that the plan has on their nodes, and may be granted later.
    """
    deadline = time.monotonic() + timeout_s
    # The most demanding pools first, as in the plan: where a node has no room any more, a small one must not take the
    # place of a large one.
    own = [pool for pool, bundles in planned.bundles.items() if not bundles[0].on]
    order = sorted(own, key=lambda pool: -max(bundle.gpus for bundle in planned.bundles[pool]))
    first = {
        pool: bundles[: singly[pool].least if pool in singly else None] for pool, bundles in planned.bundles.items()
    }
    with ExitStack() as undo:
        groups: dict[str, list[PlacementGroup]] = {pool: [] for pool in order}
        for pool in order:
            for bundle in first[pool]:
                groups[pool].append(ask_for(bundle))
                undo.callback(remove_placement_group, groups[pool][-1])
        lacking = [
            bundle
            for pool in order
            for bundle, group in zip(first[pool], groups[pool], strict=True)
            if not group.wait(_whole_seconds_until(deadline))
        ]
        if lacking:
            raise PlacementError(_lack(lacking, timeout_s))
        granted = _as_granted(first, groups)
        places = shared_places(granted, groups.get(HOST, ()), max(1, _whole_seconds_until(deadline)))
        undo.pop_all()
    seats, later = {}, {}
    for pool, numbers in singly.items():
        others = planned.bundles[pool][numbers.least :]
        seats[pool] = Seats(granted.bundles[pool][0], groups[pool], others)
        later[pool] = tuple(_ask_for_the_others(seats[pool], others, numbers.wanted))
    granted = PlacementPlan({pool: (*bundles, *later.get(pool, ())) for pool, bundles in granted.bundles.items()})
    fixed = {pool: tuple(groups[pool]) for pool in order if pool not in singly}
    return ReservedPools(granted, fixed, seats, tuple(_strays(planned, granted)), places)


def _as_granted(
    planned: Mapping[str, Sequence[Bundle]], groups: Mapping[str, Sequence[PlacementGroup]]
) -> PlacementPlan:
    """The plan with the nodes on which the bundles are."""
    names = _names()

    def placed(bundle: Bundle, group: PlacementGroup) -> Bundle:
        return _on(bundle, next(iter(placement_group_table(group)["bundles_to_node_id"].values()), ""), names)

    def beside(bundle: Bundle) -> Bundle:
        first = granted[HOST][bundle.on[0]]
        return replace(bundle, node=first.node, node_id=first.node_id)

    granted = {pool: tuple(map(placed, planned[pool], groups[pool])) for pool in groups}
    return PlacementPlan({pool: granted.get(pool) or tuple(map(beside, bundles)) for pool, bundles in planned.items()})


def _names() -> dict[str, str]:
    """Of the nodes there are, by Ray's ids of them."""
    return {node.node_id: node.name for node in from_ray(ray.nodes()).nodes}


def _on(bundle: Bundle, node_id: str, names: Mapping[str, str]) -> Bundle:
    """The bundle where Ray has placed it."""
    # A machine that is lost at this moment has no name; the bundle will be placed again.
    return replace(bundle, node=names[node_id], node_id=node_id) if node_id in names else bundle


def _strays(planned: PlacementPlan, granted: PlacementPlan) -> list[str]:
    return [
        f"{ours.pool} worker {ours.worker} lies on {theirs.node}: {ours.node}, where it was planned, had no room for it"
        for pool in planned.bundles
        for ours, theirs in zip(planned.bundles[pool], granted.bundles[pool], strict=False)  # of some, more are wanted
        if ours.node_id != theirs.node_id and not ours.on
    ]


def _ask_for_the_others(seats: Seats, planned: Sequence[Bundle], wanted: int) -> Iterator[Bundle]:
    """Where there is room for them now, they begin with the run: those of the planned ones, where they are."""
    least = len(seats.numbers)
    for _ in range(wanted - least):
        seats.ask()
    deadline = time.monotonic() + _SETTLE_S
    while num_placed(seen := seats.look()) < wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    names = _names()
    for bundle, seat in zip(planned, seen[least:], strict=False):
        if seat.place is not Place.GRANTED:
            return
        yield _on(bundle, seat.node, names)


def _whole_seconds_until(deadline: float) -> int:
    """Rounded up, because Ray rounds down and would not wait at all for the last fraction of a second."""
    return max(0, math.ceil(deadline - time.monotonic()))


def _lack(lacking: list[Bundle], timeout_s: float) -> str:
    """Which workers wait, and what of the cluster is left for them."""
    free, total = ray.available_resources(), ray.cluster_resources()
    left = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in ("GPU", "CPU"))
    waits = []
    for pool in dict.fromkeys(bundle.pool for bundle in lacking):
        bundles = [bundle for bundle in lacking if bundle.pool == pool]
        first = bundles[0]
        bound = [f"{label}={value}" for label, value in first.labels.items()]
        bound += [repr(first.resource)] if first.resource else []
        on = f" on nodes with {', '.join(bound)}" if bound else ""
        waits.append(f"pool {pool!r} ({len(bundles)} x {first.gpus} GPUs and {first.cpus + first.room:g} CPUs{on})")
    return (
        f"not reserved within {timeout_s:g} s: {', '.join(waits)}; {left} are free: stop the jobs that hold the rest "
        "(`ray status` shows them), or add nodes"
    )
