"""Whoever ends a child is named, everybody else is answered, and nobody is begun for ever."""

import random
from concurrent.futures import Future

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rewards.docket import Docket, Visit


def visit(name: str) -> Visit:
    return Visit(((0,),), name, 2, {}, Future())


def begun(docket: Docket) -> list[Visit]:
    """All that may be begun now."""
    found = []
    while (one := docket.next()) is not None:
        found.append(one)
    return found


def docket_of(names: str, width: int) -> tuple[Docket, list[Visit]]:
    docket, visits = Docket(width), [visit(name) for name in names]
    for one in visits:
        docket.add(one)
    return docket, visits


def test_as_many_as_it_is_wide_are_in_flight_in_their_order() -> None:
    docket, (a, b, c) = docket_of("abc", 2)
    assert begun(docket) == [a, b]
    docket.done(b)
    assert begun(docket) == [c]
    assert docket.everyone() == [a, c]


def test_one_that_was_the_only_one_in_flight_is_named() -> None:
    docket, (a,) = docket_of("a", 8)
    assert begun(docket) == [a]
    assert docket.ended(held=False) is a
    assert docket.everyone() == []


def test_of_several_each_is_begun_alone_until_one_is_named() -> None:
    docket, (a, b, c, d) = docket_of("abcd", 3)
    assert begun(docket) == [a, b, c]
    assert docket.ended(held=False) is None
    assert begun(docket) == [a]
    docket.done(a)
    assert begun(docket) == [b]
    assert docket.ended(held=False) is b
    assert begun(docket) == [c, d], "c is cleared, and nobody waits any more"
    assert docket.width == 3


def test_one_that_was_in_two_ended_children_is_not_cleared_again() -> None:
    docket, (a, b, c, d) = docket_of("abcd", 2)
    assert begun(docket) == [a, b]
    docket.ended(held=False)
    assert begun(docket) == [a]
    assert docket.ended(held=False) is a
    assert begun(docket) == [b, c]
    docket.ended(held=False)
    assert begun(docket) == [b]
    docket.done(b)
    assert begun(docket) == [c]
    assert docket.ended(held=False) is c
    assert begun(docket) == [d]


def test_the_others_are_innocent_when_it_is_known_who_it_was() -> None:
    docket, (a, b, c) = docket_of("abc", 3)
    begun(docket)
    docket.ended_by(b)
    assert begun(docket) == [a, c]
    docket.ended_by(c)
    assert begun(docket) == [a]
    assert docket.is_alone(a)


def test_nobody_else_is_to_blame_for_one_that_had_no_company() -> None:
    docket, (a,) = docket_of("a", 4)
    begun(docket)
    assert docket.is_alone(a)
    b, c = visit("b"), visit("c")
    docket.add(b)
    begun(docket)
    assert not docket.is_alone(a)
    assert not docket.is_alone(b)
    docket.done(b)
    assert not docket.is_alone(a), "b may have held the process while it was there"
    docket.cut_off(a)
    assert begun(docket) == [a]
    docket.add(c)
    assert begun(docket) == []
    assert docket.is_alone(a), "this time it has none"


def test_fewer_are_called_together_when_all_hold_the_process_and_each_is_in_time_alone() -> None:
    docket, (a, b, c, _) = docket_of("abcd", 4)
    begun(docket)
    docket.done(a)
    docket.cut_off(b)
    assert begun(docket) == [], "who is alone is not begun before the others have left"
    docket.cut_off(c)
    docket.done(docket.in_flight[0])
    for one in (b, c):
        assert begun(docket) == [one]
        assert docket.is_alone(one)
        docket.done(one)
    assert docket.width == 2


def test_as_many_are_called_together_when_one_was_to_blame() -> None:
    docket, (a, b) = docket_of("ab", 2)
    begun(docket)
    assert docket.ended(held=True) is None
    assert begun(docket) == [a]
    docket.done(a)
    assert begun(docket) == [b]
    assert docket.ended(held=True) is b
    assert docket.width == 2


def test_as_many_are_called_together_when_those_that_were_late_are_late_alone() -> None:
    docket, (a, _) = docket_of("ab", 2)
    begun(docket)
    docket.cut_off(a)
    docket.done(docket.in_flight[0])
    assert begun(docket) == [a]
    docket.done(a, in_time=False)
    assert docket.width == 2


@given(
    kinds=st.lists(st.sampled_from("....dhlsc"), max_size=60),
    width=st.integers(1, 16),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=300)
def test_everyone_leaves_after_at_most_three_begins(kinds: list[str], width: int, seed: int) -> None:
    """Good ones (.), ones that end the child (d), hold it (h), are late (l) or take no notice of their end (s), and
    children that end by chance (c), in any order."""
    drawn = random.Random(seed)
    docket, visits = docket_of("".join(kinds), width)
    num_begun = dict.fromkeys(visits, 0)
    left: dict[Visit, str] = {}
    by_chance = kinds.count("c")
    while docket.everyone():
        for one in begun(docket):
            num_begun[one] += 1
        assert 1 <= len(docket.in_flight) <= width
        one = drawn.choice(docket.in_flight)
        was_alone, kind = docket.is_alone(one), one.arguments
        if kind in "dh" or (by_chance and kind == "c"):
            by_chance -= kind == "c"
            culprit = docket.ended(held=kind == "h")
            if culprit is not None:
                assert culprit is one, "nobody else was in flight"
                left[culprit] = "named"
        elif kind == "s":
            docket.ended_by(one)
            left[one] = "named"
        elif kind == "l" and not was_alone:
            docket.cut_off(one)
        else:
            docket.done(one, in_time=kind != "l")
            left[one] = "answered"
    assert left.keys() == set(visits)
    assert all(one.arguments in "dhsc" for one, how in left.items() if how == "named")
    assert all(how == "named" for one, how in left.items() if one.arguments in "dhs")
    assert max(num_begun.values(), default=0) <= 3
    assert 1 <= docket.width <= width
