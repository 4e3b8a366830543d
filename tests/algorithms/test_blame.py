"""Replicas are blamed for what is well elsewhere, prompts for what fails on every replica, and neither for all else."""

from hypothesis import given
from hypothesis import strategies as st

from algorithms.blame import MOST_BREAKS, MOST_IN_A_ROW, Blame


def test_a_prompt_keeps_away_from_where_it_failed_last() -> None:
    blame = Blame()
    assert (blame.avoids(7), blame.tried(7)) == (set(), set())
    blame.failed(7, 0, "no")
    blame.failed(7, 1, "no")
    assert (blame.avoids(7), blame.tried(7)) == ({1}, {0, 1})
    blame.well(7, 0)
    assert (blame.avoids(7), blame.tried(7)) == (set(), set())


def test_three_that_are_well_elsewhere_are_the_replicas_fault() -> None:
    blame = Blame()
    for ordinal in range(5):
        blame.failed(ordinal, 0, f"no {ordinal}")
    assert [blame.well(ordinal, 1) for ordinal in range(4)] == [[], [], [(0, "no 4")], []]


def test_one_that_comes_through_ends_the_row() -> None:
    blame = Blame()
    for ordinal in range(12):
        blame.failed(ordinal, 0, "no")
        assert blame.well(ordinal, 1) == []
        if ordinal % 2:
            assert blame.well(100 + ordinal, 0) == []


def test_what_fails_everywhere_is_no_replicas_fault() -> None:
    blame = Blame()
    for ordinal in range(9):
        for replica in (0, 1, 0):
            blame.failed(ordinal, replica, "no reward worker answers")
        blame.settled(ordinal)
    assert blame.well(99, 1) == []


def test_what_failed_everywhere_for_a_time_is_no_replicas_fault() -> None:
    """The rewards were away; now prompts that failed on one are well on the other, and first all on the same one."""
    blame = Blame()
    for ordinal in range(8):
        blame.failed(ordinal, ordinal % 2, "no reward worker answers")
    assert [blame.well(ordinal, 1 - ordinal % 2) for ordinal in (0, 2, 4, 6, 1, 3, 5, 7)] == [[]] * 8


def test_a_connection_may_break_often_but_not_for_ever() -> None:
    blame = Blame()
    assert not any(blame.broke(0) for _ in range(MOST_BREAKS - 1))
    blame.well(7, 0)
    assert [blame.broke(0) for _ in range(MOST_BREAKS)] == [False] * (MOST_BREAKS - 1) + [True]


def test_one_prompt_is_one_prompt_however_often_it_comes_back() -> None:
    blame = Blame()
    for _ in range(9):
        blame.failed(7, 0, "no")
        assert blame.well(7, 1) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.booleans()), max_size=80))
def test_nobody_is_blamed_with_fewer_failures_since_he_last_came_through(steps: list[tuple[int, int, bool]]) -> None:
    blame = Blame()
    failed: dict[int, set[int]] = {replica: set() for replica in range(3)}
    for ordinal, replica, comes_through in steps:
        if not comes_through:
            blame.failed(ordinal, replica, "no")
            failed[replica].add(ordinal)
            continue
        failed[replica].clear()
        for guilty, _ in blame.well(ordinal, replica):
            assert guilty != replica
            assert len(failed[guilty]) >= MOST_IN_A_ROW
            failed[guilty].clear()
