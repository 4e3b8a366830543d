"""What the journal must never say is told."""

import pytest

from actors.fates import Event, Fates


def fates_of(*events: Event) -> Fates:
    fates = Fates()
    for ordinal in range(4):
        fates.apply({"event": "dispatched", "ordinal": ordinal, "t": 0.0, "resumed": False, "attempt": 0})
    for event in events:
        fates.apply({"t": 1.0, **event})
    return fates


def trained(ordinal: int, step: int) -> Event:
    return {"event": "trained", "ordinal": ordinal, "step": step}


def skipped(ordinal: int, step: int) -> Event:
    return {"event": "filtered", "ordinal": ordinal, "step": step, "cause": "non_finite", "tokens": 5, "seconds": 1.0}


def test_a_step_may_train_nothing_only_if_it_was_skipped() -> None:
    assert list(fates_of(trained(0, 0), skipped(1, 1), trained(2, 2)).problems()) == []
    assert list(fates_of(skipped(0, 0), skipped(1, 1)).problems()) == []
    assert list(fates_of(trained(0, 0), trained(2, 2)).problems()) == [
        "step 1 has trained nothing, and was not skipped"
    ]


def test_a_skipped_step_trains_nothing() -> None:
    problems = list(fates_of(trained(0, 0), trained(1, 1), skipped(2, 1)).problems())
    assert problems == [
        "steps have trained 1, 2 groups; each must train equally many",
        "step 1 was skipped, and has trained groups",
    ]


def test_what_a_skipped_step_was_given_is_waste() -> None:
    assert fates_of(skipped(0, 0), skipped(1, 0)).waste["non_finite"].tokens == 10


def filtered(ordinal: int, cause: str) -> Event:
    return {"event": "filtered", "ordinal": ordinal, "cause": cause}


def quarantined(ordinal: int) -> Event:
    return {"event": "quarantined", "ordinal": ordinal, "row": 7, "cause": "empty"}


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([filtered(0, "zero_std"), filtered(0, "surplus")], "ordinal 0 was left out 2 times (zero_std, surplus)"),
        ([filtered(0, "surplus"), filtered(0, "surplus")], "ordinal 0 was left out 2 times (surplus, surplus)"),
        ([quarantined(1), filtered(1, "stale")], "ordinal 1 was left out 2 times (quarantined, stale)"),
        ([quarantined(1), quarantined(1)], "ordinal 1 was left out 2 times (quarantined, quarantined)"),
        ([trained(2, 0), filtered(2, "stale")], "ordinal 2 was trained and left out (stale)"),
        ([skipped(3, 0), filtered(3, "surplus")], "ordinal 3 was left out 2 times (non_finite, surplus)"),
    ],
)
def test_an_ordinal_has_one_fate_whatever_it_is(events: list[Event], problem: str) -> None:
    found = fates_of(*events)
    assert list(found.problems()) == [problem]
    assert found.num_doubled == 1
    assert fates_of(events[0]).num_doubled == 0


def began(groups_per_batch: int) -> Event:
    return {"event": "began", "ordinal": -1, "groups_per_batch": groups_per_batch}


def resumed(version: int, **size: int) -> Event:
    return {"event": "resumed", "ordinal": -1, "lines": 0, "version": version, **size}


def test_steps_are_held_to_their_size_wherever_the_run_went_on() -> None:
    """`apply` alone: what a resumed line takes back is taken out before."""
    first, second = [trained(0, 0), trained(1, 0)], [trained(2, 1), trained(3, 1)]
    for size in ({}, {"groups_per_batch": 2}):
        assert list(fates_of(*first, resumed(1, **size), *second).problems()) == []
    short = "step 1 has taken 1 groups, and groups_per_batch is 2"
    assert list(fates_of(*first, resumed(1, groups_per_batch=2), trained(2, 1)).problems()) == [short]
    assert list(fates_of(began(2), *first, resumed(1), *second).problems()) == []
    assert list(fates_of(began(3), *first, resumed(1), *second).problems()) == [
        "step 0 has taken 2 groups, and groups_per_batch is 3"
    ]


def test_a_run_may_go_on_with_steps_of_another_size() -> None:
    first = [began(2), trained(0, 0), trained(1, 0)]
    assert list(fates_of(*first, resumed(1, groups_per_batch=1), trained(2, 1), trained(3, 2)).problems()) == []


def test_a_journal_that_does_not_say_the_size_is_held_to_equal_steps_between_two_resumes() -> None:
    first = [trained(0, 0), resumed(1), trained(1, 1), trained(2, 1)]
    assert list(fates_of(*first).problems()) == []
    assert list(fates_of(*first, trained(3, 2)).problems()) == [
        "steps have trained 1, 2 groups; each must train equally many"
    ]


def test_a_skipped_step_takes_as_many_groups_as_the_others() -> None:
    assert list(fates_of(began(2), skipped(0, 0), skipped(1, 0)).problems()) == []
    assert list(fates_of(began(2), skipped(0, 0)).problems()) == [
        "step 0 has taken 1 groups, and groups_per_batch is 2"
    ]


def test_a_step_is_not_taken_on_both_sides_of_a_resume() -> None:
    size = {"groups_per_batch": 1}
    problems = list(fates_of(began(1), trained(0, 0), resumed(0, **size), trained(1, 0)).problems())
    assert problems == ["step 0 was taken before the run went on, and after"]
