"""Bundles of one pool that come and go one by one: each has a placement group of its own, as every bundle has.

Nothing here waits: a seat is asked for, looked at now and then, and given back. What cannot be granted yet stays asked
for, and is what Ray's autoscaler adds machines for.
"""

import secrets
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.elastic import Place, Seat
from placement.plan import NODE_RESOURCE_SHARE, Bundle


class Seats:
    """Equal seats; the numbers count up, and the first ones are those that were granted when the run began."""

    def __init__(self, bundle: Bundle, groups: Iterable[PlacementGroup] = (), planned: Iterable[Bundle] = ()) -> None:
        """`groups`: asked for already; `planned`: the next ones, on their nodes."""
        self._bundle = bundle
        self._planned = list(planned)
        self._numbers = count()
        self._groups: dict[int, PlacementGroup] = {next(self._numbers): group for group in groups}
        self._gone: set[int] = set()
        self.drain_by: dict[int, float] = {}
        """Until when a seat's machine will be there (seconds since the epoch), where it is being drained and Ray was
        told when it goes."""

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self._groups)

    def ask(self) -> int:
        """One seat more, where it was planned, or wherever there is room for it; its number."""
        number = next(self._numbers)
        bundle = self._planned.pop(0) if self._planned else replace(self._bundle, node="", node_id="")
        self._groups[number] = ask_for(replace(bundle, worker=number))
        return number

    def give_back(self, number: int) -> None:
        """Ray kills whoever is still on it."""
        group = self._groups.pop(number, None)
        self._gone.discard(number)
        if group is not None:
            remove_placement_group(group)

    def condemn(self, number: int) -> None:
        """Its machine does not answer any more, whatever Ray says."""
        if number in self._groups:
            self._gone.add(number)

    def options(self, number: int) -> dict[str, Any]:
        """Options with which a Ray actor fills exactly this seat."""
        strategy = PlacementGroupSchedulingStrategy(self._groups[number], placement_group_bundle_index=0)
        return {"num_cpus": self._bundle.cpus, "num_gpus": self._bundle.gpus, "scheduling_strategy": strategy}

    def look(self) -> list[Seat]:
        """What Ray says of each; nobody is on them as far as is known here."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        draining: dict[str, int] = cluster_state.get_draining_nodes()
        seats = []
        for number, group in list(self._groups.items()):
            told = placement_group_table(group)
            node = next(iter(told.get("bundles_to_node_id", {}).values()), "")
            place = self._place(number, told.get("state", ""), node, alive, draining)
            if place is Place.DRAINING and draining[node]:
                self.drain_by[number] = draining[node] / 1000
            seats.append(Seat(number, place, node=node))
        return seats

    def _place(self, number: int, told: str, node: str, alive: set[str], draining: dict[str, int]) -> Place:
        if number in self._gone or told in ("RESCHEDULING", "REMOVED") or (told == "CREATED" and node not in alive):
            return Place.GONE
        if told != "CREATED":
            return Place.ASKED
        return Place.DRAINING if node in draining else Place.GRANTED

    def release(self) -> None:
        """Give all back."""
        for number in self.numbers:
            self.give_back(number)


def ask_for(bundle: Bundle) -> PlacementGroup:
    """A placement group of this bundle alone: on its node, or where that has no room, on another that bears its labels.

    Ray places it again, by the same rule, when its machine is lost: a label with the node's id would hold it there.
    """
    return placement_group(
        [resources_of(bundle)],
        strategy="STRICT_PACK",  # one bundle lies on one node in any case, and only this one takes a target
        name=f"paceline-{bundle.pool}-{bundle.worker}-{secrets.token_hex(4)}",  # Ray takes a name once
        _soft_target_node_id=bundle.node_id or None,
        bundle_label_selector=[dict(bundle.labels)] if bundle.labels else None,
    )


def resources_of(bundle: Bundle) -> dict[str, float]:
    """What the bundle takes of its node, in Ray's words, with the room that it makes for others; nothing where it lies
    with another."""
    if bundle.on:
        return {}
    resources = {"CPU": bundle.cpus + bundle.room, "GPU": float(bundle.gpus)}
    if bundle.resource is not None:
        resources[bundle.resource] = NODE_RESOURCE_SHARE
    return {name: amount for name, amount in resources.items() if amount}
