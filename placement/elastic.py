"""Who joins and who leaves, from what is wanted and what the cluster offers: pure.

A seat is the place of one replica: a bundle that is asked for, then granted, and lost when its machine goes. The
number of seats that are asked for or granted, and not about to go, is the target's; so is that of the replicas, as far
as the cluster has room for them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Place(Enum):
    """What the cluster says of a seat."""

    ASKED = "asked"
    """It waits for room; meanwhile it is a demand that an autoscaler sees."""
    GRANTED = "granted"
    DRAINING = "draining"
    """Its machine is about to go."""
    GONE = "gone"
    """Its machine has gone."""


class Tenant(Enum):
    """What is on a seat."""

    NOBODY = "nobody"
    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Seat:
    """One place for a replica."""

    number: int
    """Counts up; never used again."""
    place: Place
    tenant: Tenant = Tenant.NOBODY
    node: str = ""
    """Ray's id of its machine, once it is granted."""


@dataclass(frozen=True, slots=True)
class Moves:
    """What to do now."""

    ask: int = 0
    """So many seats more."""
    join: tuple[int, ...] = ()
    """Seats on which a replica is to be started."""
    leave: tuple[tuple[int, str], ...] = ()
    """Seats whose replica is to leave, and why."""
    give_back: tuple[int, ...] = ()
    """Seats that nobody is on and nobody needs."""


_CAUSES = {Place.DRAINING: "its machine is being drained", Place.GONE: "its machine is gone"}


def moves(target: int, seats: Sequence[Seat]) -> Moves:
    """What brings the seats nearer to the target; nothing once they are as wanted."""
    doomed = [seat for seat in seats if seat.place in _CAUSES]
    good = [seat for seat in seats if seat.place not in _CAUSES and seat.tenant is not Tenant.LEAVING]
    surplus = _last_needed_first(good)[: max(0, len(good) - target)]
    kept = [seat for seat in good if seat not in surplus]
    leave = [(seat.number, _CAUSES[seat.place]) for seat in doomed if _is_at_work(seat)]
    leave += [(seat.number, f"{target} replicas are wanted") for seat in surplus if _is_at_work(seat)]
    return Moves(
        ask=max(0, target - len(good)),
        join=tuple(seat.number for seat in kept if seat.place is Place.GRANTED and seat.tenant is Tenant.NOBODY),
        leave=tuple(leave),
        give_back=tuple(seat.number for seat in (*doomed, *surplus) if seat.tenant is Tenant.NOBODY),
    )


def num_placed(seats: Sequence[Seat]) -> int:
    """Seats that hold a replica, or can."""
    return sum(seat.place is Place.GRANTED and seat.tenant is not Tenant.LEAVING for seat in seats)


def _is_at_work(seat: Seat) -> bool:
    return seat.tenant in (Tenant.STARTING, Tenant.SERVING)


def _last_needed_first(seats: Sequence[Seat]) -> list[Seat]:
    """Who goes first: a seat that nobody is on, with which nothing is lost; then the newest on the emptiest machine."""
    crowd = Counter(seat.node for seat in seats if seat.tenant is not Tenant.NOBODY)

    def cost(seat: Seat) -> tuple[int, int, int, int]:
        tenant = (Tenant.NOBODY, Tenant.STARTING, Tenant.SERVING).index(seat.tenant)
        return seat.place is Place.GRANTED, tenant, crowd[seat.node], -seat.number

    return sorted(seats, key=cost)
