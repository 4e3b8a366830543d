"""The pacer under arbitrary interleavings: the bound, one fate per ordinal, no deadlock, the limits.

Rules are everything that can happen to a run, crashes and resumes from a checkpoint included. `make check` walks some
thousands of steps, `make prove` a million.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from algorithms.pacing import Pacer, WhenStale
from algorithms.slots import PacerState, Slot, Taken
from tests.prove import ONLY_PROVE

PROVE_STEPS = 1_000_000
SCHEDULE_LENGTH = 100
NUM_SCHEDULES = 150


@dataclass
class Fates:
    """What a run knows for certain: it is part of the checkpoint, because the policy is."""

    published: int = 0
    trained: dict[int, int] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)

    def end(self, ordinal: int, fate: str) -> None:
        assert ordinal not in self.trained, f"{ordinal} was trained and then {fate}"
        assert ordinal not in self.left, f"{ordinal} was {self.left[ordinal]} and then {fate}"
        self.left[ordinal] = fate


class Schedule(RuleBasedStateMachine):
    """Any order of events, with any of the knobs."""

    pacer_type: type[Pacer] = Pacer
    modes: tuple[WhenStale, ...] = ("pace", "mask", "requeue")
    num_steps = 0  # over all schedules

    @initialize(
        data=st.data(),
        batch=st.integers(1, 5),
        staleness=st.integers(0, 4),
        over_sampling=st.sampled_from([1.0, 1.0, 1.5, 2.0]),
        extra_depth=st.none() | st.integers(0, 12),
        capacity=st.none() | st.integers(1, 12),
        batches=st.integers(1, 30),
    )
    def start(
        self,
        data: st.DataObject,
        batch: int,
        staleness: int,
        over_sampling: float,
        extra_depth: int | None,
        capacity: int | None,
        batches: int,
    ) -> None:
        self.mode = data.draw(st.sampled_from(self.modes))
        staleness = max(staleness, 1) if self.mode == "mask" else staleness
        self.make: Callable[[], Pacer] = lambda: self.pacer_type(
            groups_per_batch=batch,
            max_staleness=staleness,
            num_batches=batches,
            when_stale=self.mode,
            over_sampling=over_sampling,
            pipeline_depth=None if extra_depth is None else batch + extra_depth,
            max_in_flight=capacity,
        )
        self.over_sampling = over_sampling
        self.pacer = self.make()
        self.bound, self.capacity, self.depth = staleness, self.pacer.max_in_flight, self.pacer.pipeline_depth
        self.over = 0  # groups in flight when the capacity fell: they may only become fewer
        self.num_groups = batch * batches
        self.fates = Fates()
        self.sampled: dict[int, tuple[int, int]] = {}  # ordinal -> oldest and newest version of what is ready
        self.checkpoint: tuple[PacerState, Fates] = (self.pacer.state(), deepcopy(self.fates))

    @rule(count=st.integers(1, 8))
    def dispatch(self, count: int) -> None:
        for _ in range(count):
            slot = self.pacer.dispatch(self.fates.published)
            if slot is not None:
                assert slot.ordinal not in self.fates.trained, "dispatched after it was trained"
                assert slot.ordinal not in self.fates.left, "dispatched after it had left"

    def _pick(self, data: st.DataObject) -> Slot:
        return data.draw(st.sampled_from(sorted(self.pacer.in_flight.values(), key=lambda slot: slot.ordinal)))

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(data=st.data(), newer=st.integers(0, 3), span=st.integers(0, 5))
    def finish(self, data: st.DataObject, newer: int, span: int) -> None:
        slot = self._pick(data)
        oldest = slot.version if slot.resumed else min(slot.version + newer, self.fates.published)
        self._finish(slot, oldest, min(oldest + span, self.fates.published))

    def _finish(self, slot: Slot, oldest: int, newest: int) -> None:
        assert self.pacer.finished(slot, oldest, newest)
        assert not self.pacer.finished(slot, oldest, newest), "a second report of the same attempt is refused"
        assert not self.pacer.failed(slot)
        self.sampled[slot.ordinal] = (oldest, newest)

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        assert self.pacer.failed(self._pick(data))

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(share=st.integers(1, 3), remainder=st.integers(0, 2), drained=st.booleans())
    def lose_replica(self, share: int, remainder: int, drained: bool) -> None:
        """Every n-th group was on it; a replica that is drained hands back what it has sampled."""
        for slot in list(self.pacer.in_flight.values()):
            if slot.ordinal % share == remainder % share:
                if drained:
                    has_tokens = slot.resumed or slot.ordinal % 4
                    assert self.pacer.interrupted(slot, slot.version if has_tokens else None)
                else:
                    assert self.pacer.failed(slot)

    @precondition(lambda self: self.pacer.num_in_flight)
    @rule(data=st.data())
    def filter(self, data: st.DataObject) -> None:
        slot = self._pick(data)
        assert self.pacer.dropped(slot)
        self.fates.end(slot.ordinal, "filtered")

    @rule()
    def publish(self) -> None:
        self.fates.published = self.pacer.next_version

    @rule(extra=st.integers(0, 12))
    def set_depth(self, extra: int) -> None:
        """The closed loop moves it; what is out already stays out."""
        self.pacer.pipeline_depth = min(self.pacer.groups_per_batch + extra, self.pacer.deepest)
        self.depth = max(self.pacer.pipeline_depth, self.pacer.num_outstanding)

    @rule(capacity=st.integers(0, 12))
    def set_capacity(self, capacity: int) -> None:
        """Replicas join and leave; what those that are there hold already they keep."""
        self.pacer.max_in_flight = self.capacity = capacity
        self.over = self.pacer.num_in_flight

    @rule()
    def take(self) -> None:
        version, taken = self.pacer.next_version, self.pacer.take()
        if taken is not None:
            self._train(taken, version)

    def _train(self, taken: Taken, version: int) -> None:
        assert len(taken.batch) == self.pacer.groups_per_batch
        for ordinal in taken.batch:
            oldest, newest = self.sampled[ordinal]
            counts = newest if self.mode == "mask" else oldest  # in mask mode the loss leaves the older tokens out
            assert 0 <= version - counts <= self.bound, "beyond the bound"
            self.fates.end(ordinal, "trained")
            self.fates.trained[ordinal] = version
        for ordinal in taken.left_out:
            assert self.mode == "mask" or self.over_sampling > 1, "a group was left out without need"
            self.fates.end(ordinal, self.pacer.left_out_cause)
        for slot in taken.requeued:
            assert self.mode == "requeue"
            assert slot.version <= version - self.bound, "only what cannot be trained any more is aborted"

    @rule()
    def save(self) -> None:
        self.checkpoint = (self.pacer.state(), deepcopy(self.fates))

    @rule(survives=st.integers(0, 2))
    def crash(self, survives: int) -> None:
        """Everything falls back to the checkpoint; of its scored groups some tokens were saved with it."""
        state, fates = self.checkpoint
        self.fates = deepcopy(fates)
        self.pacer = self.make()
        kept = {group.slot.ordinal for group in state.ready if group.slot.ordinal % 2 < survives}
        self.pacer.restore(state, kept)
        self.sampled = {group.slot.ordinal: (group.oldest_version, group.newest_version) for group in state.ready}
        # The replicas start empty and get the policy's version.
        self.fates.published = self.pacer.next_version
        self.depth = max(self.pacer.pipeline_depth, self.pacer.num_outstanding)
        self.capacity, self.over = self.pacer.max_in_flight, 0

    @invariant()
    def count(self) -> None:
        type(self).num_steps += 1

    @invariant()
    def limits_hold(self) -> None:
        if hasattr(self, "pacer"):
            self.over = min(self.over, self.pacer.num_in_flight)
            assert self.pacer.num_in_flight <= max(self.capacity, self.over)
            assert self.pacer.num_outstanding <= self.depth

    @invariant()
    def something_can_move(self) -> None:
        """With nothing in flight, a replica and the newest weights out, there is a group to dispatch or a batch to
        take."""
        if hasattr(self, "pacer") and not self.pacer.exhausted and not self.pacer.num_in_flight and self.capacity:
            can_dispatch = self.pacer.blocked(self.pacer.next_version) is None
            assert can_dispatch or self.pacer.waiting() is None, "deadlock"

    def teardown(self) -> None:
        """Whatever happened, the run can be finished, and every ordinal has one fate."""
        if not hasattr(self, "pacer"):
            return
        self.pacer.max_in_flight = max(1, self.capacity)
        for _ in range(20 * self.num_groups + 100):
            if self.pacer.exhausted:
                break
            self.publish()
            self.dispatch(8)
            for slot in list(self.pacer.in_flight.values()):
                self._finish(slot, slot.version, self.fates.published)
            self.take()
        assert self.pacer.exhausted, "deadlock"
        assert len(self.fates.trained) == self.num_groups
        for ordinal in self.pacer.leftover():
            self.fates.end(ordinal, "left over")
        assert sorted(self.fates.left) == list(range(self.pacer.state().next_ordinal)), "an ordinal was lost"


SETTINGS = settings(
    max_examples=NUM_SCHEDULES,
    stateful_step_count=SCHEDULE_LENGTH,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_arbitrary_schedules() -> None:
    run_state_machine_as_test(Schedule, settings=SETTINGS)


@ONLY_PROVE
@pytest.mark.timeout(7200)
def test_a_million_steps() -> None:
    before = Schedule.num_steps
    while Schedule.num_steps - before < PROVE_STEPS:
        run_state_machine_as_test(Schedule, settings=settings(SETTINGS, max_examples=2000, database=None))
        print(f"{Schedule.num_steps - before:,} steps", flush=True)


class CountingPacer(Pacer):
    """Admits by a count of outstanding groups alone, as most systems do, and waits for nobody."""

    def _one_more_fits(self, version: int) -> bool:
        return self.num_outstanding < self.deepest

    def _leaves_one_behind(self) -> bool:
        return False

    def _trainable(self, group: Any) -> bool:
        return True


class LenientPacer(Pacer):
    """Requeues without aborting what has expired, and trains it when it comes."""

    def _abort_expired(self) -> tuple[Slot, ...]:
        return ()

    def _trainable(self, group: Any) -> bool:
        return True


class ForgetfulPacer(Pacer):
    """Masks tokens, but keeps groups that have no fresh one."""

    def _trainable(self, group: Any) -> bool:
        return True


class LosingPacer(Pacer):
    """Forgets interrupted groups when it is restored."""

    def _unfinished_slots(self) -> list[Slot]:
        return [*self._planned, *self._in_flight.values()]


@pytest.mark.parametrize(
    ("mutant", "mode"),
    [(CountingPacer, "pace"), (LenientPacer, "requeue"), (ForgetfulPacer, "mask"), (LosingPacer, "pace")],
)
def test_a_mutant_is_caught(mutant: type[Pacer], mode: WhenStale) -> None:
    machine = type("MutantSchedule", (Schedule,), {"pacer_type": mutant, "modes": (mode,)})
    # The same search every time: now and then another one meets a bare assertion of the pacer's first.
    search = settings(
        SETTINGS,
        max_examples=3000,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError, match=r"beyond the bound|lost"):
        run_state_machine_as_test(machine, settings=search)
