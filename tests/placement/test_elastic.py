"""What is wanted and what the cluster offers decide who joins and who leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.config import RolloutPoolConfig
from placement.elastic import Moves, Place, Seat, Tenant, moves, num_placed

ASKED, GRANTED, DRAINING, GONE = Place
NOBODY, STARTING, SERVING, LEAVING = Tenant


@pytest.mark.parametrize(
    ("target", "seats", "expected"),
    [
        (2, [], Moves(ask=2)),
        (2, [Seat(0, ASKED), Seat(1, ASKED)], Moves()),
        (2, [Seat(0, GRANTED), Seat(1, ASKED)], Moves(join=(0,))),
        (2, [Seat(0, GRANTED, STARTING), Seat(1, GRANTED, SERVING)], Moves()),
        (1, [Seat(0, GRANTED, SERVING), Seat(1, ASKED)], Moves(give_back=(1,))),
        (1, [Seat(0, GRANTED, SERVING), Seat(1, GRANTED)], Moves(give_back=(1,))),
        (1, [Seat(0, GRANTED, STARTING), Seat(1, GRANTED, SERVING)], Moves(leave=((0, "1 replicas are wanted"),))),
        (1, [Seat(0, GRANTED, SERVING), Seat(1, GRANTED, SERVING)], Moves(leave=((1, "1 replicas are wanted"),))),
        (1, [Seat(0, GRANTED, SERVING), Seat(1, GRANTED, LEAVING)], Moves()),
        (1, [Seat(1, GRANTED, LEAVING)], Moves(ask=1)),
        (1, [Seat(0, DRAINING, SERVING)], Moves(ask=1, leave=((0, "its machine is being drained"),))),
        (1, [Seat(0, DRAINING, LEAVING), Seat(1, GRANTED)], Moves(join=(1,))),
        (1, [Seat(0, GONE, STARTING)], Moves(ask=1, leave=((0, "its machine is gone"),))),
        (1, [Seat(0, GONE)], Moves(ask=1, give_back=(0,))),
        (1, [Seat(0, DRAINING), Seat(1, ASKED)], Moves(give_back=(0,))),
    ],
)
def test_the_seats_come_nearer_to_the_target(target: int, seats: list[Seat], expected: Moves) -> None:
    assert moves(target, seats) == expected


def test_who_is_not_needed_any_more_leaves_a_machine_empty() -> None:
    seats = [
        Seat(0, GRANTED, SERVING, "a"),
        Seat(1, GRANTED, SERVING, "b"),
        Seat(2, GRANTED, SERVING, "b"),
    ]
    assert moves(2, seats).leave == ((0, "2 replicas are wanted"),)
    assert moves(1, seats).leave == ((0, "1 replicas are wanted"), (2, "1 replicas are wanted"))


SEATS = st.lists(st.tuples(st.sampled_from(Place), st.sampled_from(Tenant), st.sampled_from("ab")), max_size=8)


@given(st.integers(1, 6), SEATS)
def test_once_the_moves_are_made_nothing_is_left_to_do(target: int, drawn: list[tuple[Place, Tenant, str]]) -> None:
    """And no seat is given back under a replica, none is asked for beyond the target, and none is moved twice."""
    seats = [
        Seat(number, place, NOBODY if place is ASKED else tenant, node)
        for number, (place, tenant, node) in enumerate(drawn)
    ]
    now = moves(target, seats)
    by_number = {seat.number: seat for seat in seats}
    assert all(by_number[number].tenant is NOBODY for number in (*now.give_back, *now.join))
    assert len({*now.give_back, *now.join, *(n for n, _ in now.leave)}) == len([*now.give_back, *now.join, *now.leave])
    leaving = dict(now.leave)
    after = [
        Seat(
            seat.number,
            seat.place,
            LEAVING if seat.number in leaving else STARTING if seat.number in now.join else seat.tenant,
            seat.node,
        )
        for seat in seats
        if seat.number not in now.give_back
    ]
    after += [Seat(len(seats) + index, ASKED) for index in range(now.ask)]
    assert moves(target, after) == Moves()
    stays = [seat for seat in after if seat.place in (ASKED, GRANTED) and seat.tenant is not LEAVING]
    assert len(stays) == target
    assert num_placed(after) <= target


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_workers": 1, "min_workers": 2}, "num_workers: 1 is less than min_workers=2"),
        ({"num_workers": 9, "max_workers": 8}, "num_workers: 9 is more than max_workers=8"),
        ({"num_workers": 2, "max_workers": 3, "strategy": "spread"}, "strategy: replicas that come and go"),
    ],
)
def test_a_range_that_cannot_be_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutPoolConfig.model_validate(given)


def test_a_pool_is_elastic_when_its_range_is_wider_than_one_number() -> None:
    assert not RolloutPoolConfig(num_workers=4).elastic
    assert not RolloutPoolConfig(num_workers=4, min_workers=4, max_workers=4).elastic
    pool = RolloutPoolConfig(num_workers=4, min_workers=2)
    assert (pool.elastic, pool.least, pool.most) == (True, 2, 4)
