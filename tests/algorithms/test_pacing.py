"""The pacer under arbitrary interleavings: the bound, one fate per ordinal, no deadlock."""

import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from algorithms.pacing import Pacer, Slot


def fill(pacer: Pacer, version: int) -> list[Slot]:
    slots = []
    while (slot := pacer.dispatch(version)) is not None:
        slots.append(slot)
    return slots


def test_zero_staleness_is_synchronous() -> None:
    pacer = Pacer(groups_per_batch=4, max_staleness=0, num_batches=2)
    slots = fill(pacer, 0)
    assert len(slots) == 4
    for slot in slots[:3]:
        assert pacer.finished(slot, 0)
    assert pacer.waiting() == "groups"
    assert pacer.finished(slots[3], 0)
    assert pacer.take() == [0, 1, 2, 3]
    assert pacer.blocked(0) == "bound", "nothing may be sampled from version 0 once version 1 is being made"
    assert len(fill(pacer, 1)) == 4
    assert pacer.blocked(1) == "done"


def test_the_step_waits_for_the_oldest_group_and_for_no_other() -> None:
    pacer = Pacer(groups_per_batch=2, max_staleness=1, num_batches=10)
    slots = fill(pacer, 0)
    assert len(slots) == 4
    straggler = slots[0]
    for slot in slots[1:]:
        pacer.finished(slot, 0)
    assert pacer.take() == [1, 2], "the straggler may still be trained at version 1"
    fresh = fill(pacer, 0) + fill(pacer, 1)
    for slot in fresh:
        pacer.finished(slot, slot.version)
    assert pacer.num_ready >= 2
    assert pacer.waiting() == "oldest", "at version 1 the straggler of version 0 is due"
    pacer.finished(straggler, 0)
    assert straggler.ordinal in (pacer.take() or [])


def test_a_late_duplicate_is_refused() -> None:
    pacer = Pacer(groups_per_batch=1, max_staleness=0, num_batches=1)
    first = pacer.dispatch(0)
    assert first is not None
    assert pacer.failed(first)
    second = pacer.dispatch(0)
    assert second == Slot(ordinal=0, attempt=1, version=0)
    assert not pacer.finished(first, 0)
    assert pacer.finished(second, 0)
    assert not pacer.failed(second)


def test_tokens_older_than_the_dispatch_are_an_error() -> None:
    pacer = Pacer(groups_per_batch=1, max_staleness=1, num_batches=1, version=3)
    slot = pacer.dispatch(3)
    assert slot is not None
    with pytest.raises(ValueError, match="never committed"):
        pacer.finished(slot, 2)


class Schedule(RuleBasedStateMachine):
    """Any order of dispatch, finish, fail, drop, take and publish, with any of the knobs."""

    pacer_type: type[Pacer] = Pacer

    @initialize(
        batch=st.integers(1, 5),
        staleness=st.integers(0, 4),
        extra_depth=st.none() | st.integers(0, 12),
        capacity=st.none() | st.integers(1, 12),
        batches=st.integers(1, 30),
    )
    def start(self, batch: int, staleness: int, extra_depth: int | None, capacity: int | None, batches: int) -> None:
        depth = None if extra_depth is None else batch + extra_depth
        self.pacer = self.pacer_type(
            groups_per_batch=batch,
            max_staleness=staleness,
            num_batches=batches,
            pipeline_depth=depth,
            max_in_flight=capacity,
        )
        self.bound, self.depth, self.capacity = staleness, self.pacer.pipeline_depth, self.pacer.max_in_flight
        self.num_groups = batch * batches
        self.published = 0  # what the replicas hold
        self.trained: dict[int, int] = {}
        self.dropped: set[int] = set()
        self.seen: set[int] = set()

    @rule(count=st.integers(1, 8))
    def dispatch(self, count: int) -> None:
        for _ in range(count):
            slot = self.pacer.dispatch(self.published)
            if slot is not None:
                assert slot.ordinal not in self.trained
                assert slot.ordinal not in self.dropped
                self.seen.add(slot.ordinal)

    def _pick(self, data: st.DataObject) -> Slot:
        return data.draw(st.sampled_from(sorted(self.pacer.in_flight.values(), key=lambda slot: slot.ordinal)))

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(data=st.data(), newer=st.integers(0, 3))
    def finish(self, data: st.DataObject, newer: int) -> None:
        slot = self._pick(data)
        oldest = min(slot.version + newer, self.published)
        assert self.pacer.finished(slot, oldest)
        assert not self.pacer.finished(slot, oldest), "a second report of the same attempt is refused"

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        assert self.pacer.failed(self._pick(data))

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        slot = self._pick(data)
        assert self.pacer.dropped(slot)
        self.dropped.add(slot.ordinal)

    @rule()
    def publish(self) -> None:
        self.published = self.pacer.next_version

    @rule()
    def take(self) -> None:
        version = self.pacer.next_version
        versions = dict(self.pacer._ready)
        batch = self.pacer.take()
        if batch is None:
            return
        assert len(batch) == self.pacer.groups_per_batch
        for ordinal in batch:
            assert ordinal not in self.trained, "trained twice"
            assert 0 <= version - versions[ordinal] <= self.bound, "beyond the bound"
            self.trained[ordinal] = version

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "pacer"):
            return
        assert self.pacer.num_in_flight <= self.capacity
        assert self.pacer.num_in_flight + self.pacer.num_ready <= self.depth

    def teardown(self) -> None:
        """Whatever happened, the run can be finished: no deadlock, and every ordinal has one fate."""
        if not hasattr(self, "pacer"):
            return
        for _ in range(20 * self.num_groups + 100):
            if self.pacer.exhausted:
                break
            self.publish()
            self.dispatch(8)
            for slot in list(self.pacer.in_flight.values()):
                self.pacer.finished(slot, slot.version)
            self.take()
        assert self.pacer.exhausted, "deadlock"
        assert len(self.trained) == self.num_groups
        assert not set(self.trained) & self.dropped
        assert set(self.trained) | self.dropped == self.seen, "an ordinal was lost"


# `make prove` walks a million steps, `make check` some thousands.
NUM_SCHEDULES = 20_000 if os.environ.get("PACELINE_PROVE") else 150
Schedule.TestCase.settings = settings(max_examples=NUM_SCHEDULES, stateful_step_count=60, deadline=None)
test_schedules = Schedule.TestCase


class CountingPacer(Pacer):
    """A mutant: admits by a count of outstanding groups alone, as most systems do, so a straggler slips the bound."""

    def _meets_deadlines(self, outstanding, next_version):  # type: ignore[no-untyped-def]
        return sum(outstanding.values()) <= self.groups_per_batch * (self.max_staleness + 1)


def test_a_mutant_that_counts_is_caught() -> None:
    """A straggler stays in flight while the count admits younger groups past it."""
    pacer = CountingPacer(groups_per_batch=2, max_staleness=1, num_batches=10)
    straggler = fill(pacer, 0)[0]
    for _ in range(3):
        version = pacer.next_version
        fill(pacer, version)
        for slot in list(pacer.in_flight.values()):
            if slot != straggler:
                pacer.finished(slot, slot.version)
        assert pacer.take() is not None
    pacer.finished(straggler, 0)
    assert straggler.ordinal in (pacer.take() or [])
    assert pacer.next_version - 1 - straggler.version > pacer.max_staleness
