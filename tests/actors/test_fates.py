"""What the journal must never say is told."""

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
    assert problems == ["step 1 was skipped, and has trained groups"]


def test_what_a_skipped_step_was_given_is_waste() -> None:
    assert fates_of(skipped(0, 0), skipped(1, 0)).waste["non_finite"].tokens == 10
