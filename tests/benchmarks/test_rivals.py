"""Each rival's formula on cases small enough to do by hand; B = 2 throughout."""

import pytest

from algorithms.simulation.simulator import simulate
from algorithms.slots import Slot, Taken
from benchmarks.pacing import NO_BOUND, config, setup
from benchmarks.rivals import Areal, Rival, Trl, Verl

B = 2
MANY = 100


def fill(pacer: Rival, version: int) -> list[Slot]:
    slots = []
    while (slot := pacer.dispatch(version)) is not None:
        slots.append(slot)
    return slots


def finish(pacer: Rival, *slots: Slot) -> None:
    for slot in slots:
        assert pacer.finished(slot, slot.version, slot.version)


def test_areal_counts_all_that_was_ever_accepted() -> None:
    pacer = Areal(1, groups_per_batch=B, num_batches=10, max_in_flight=MANY)
    first = fill(pacer, 0)
    assert len(first) == 4, "(eta + version + 1) B"
    finish(pacer, *first)
    assert pacer.blocked(0) == "bound", "a finish makes no room, an accepted group counts for ever"
    assert pacer.take() == Taken((0, 1))
    assert pacer.blocked(0) == "bound", "nor does a batch, before its version is committed"
    assert len(fill(pacer, 1)) == 2


def test_areal_takes_in_order_of_dispatch_and_waits_for_no_straggler() -> None:
    pacer = Areal(1, groups_per_batch=B, num_batches=10, max_in_flight=MANY)
    straggler, *others = fill(pacer, 0)
    finish(pacer, *reversed(others))
    assert pacer.take() == Taken((1, 2))
    finish(pacer, *fill(pacer, 1), *fill(pacer, 2))
    assert pacer.take() == Taken((3, 4))
    finish(pacer, *fill(pacer, 2))
    assert pacer.take() == Taken((5, 6))
    finish(pacer, straggler)
    pacer.take()
    assert pacer.max_staleness_seen == 3, "more than eta = 1: a count of work bounds no single group"


def test_areal_runs_one_batch_at_once_by_default() -> None:
    assert len(fill(Areal(8, groups_per_batch=B, num_batches=10), 0)) == B


def test_areal_without_staleness_is_synchronous() -> None:
    pacer = Areal(0, groups_per_batch=B, num_batches=10)
    for version in range(3):
        slots = fill(pacer, version)
        assert len(slots) == B
        finish(pacer, *slots)
        assert pacer.take() is not None
    assert pacer.max_staleness_seen == 0


def test_trl_drops_by_the_version_at_submission_and_tells_it_with_the_next_batch() -> None:
    pacer = Trl(1, groups_per_batch=B, num_batches=10, max_in_flight=MANY, queue_maxsize=800)
    straggler, *others = (pacer.dispatch(0) for _ in range(5))
    assert straggler is not None
    finish(pacer, *filter(None, others))
    assert pacer.take() == Taken((1, 2))
    assert pacer.take() == Taken((3, 4)), "one version old, which is allowed"
    finish(pacer, straggler)
    assert pacer.take() is None
    finish(pacer, *filter(None, (pacer.dispatch(2), pacer.dispatch(2))))
    assert pacer.take() == Taken((5, 6), left_out=(0,))
    assert pacer.max_staleness_seen == 1


def test_trl_takes_in_order_of_arrival() -> None:
    pacer = Trl(4, groups_per_batch=B, num_batches=10)
    finish(pacer, *reversed(fill(pacer, 0)))
    assert pacer.take() == Taken((7, 6))


def test_trl_generates_as_many_groups_as_it_may_be_stale_and_its_queue_is_finite() -> None:
    assert len(fill(Trl(4, groups_per_batch=B, num_batches=10), 0)) == 4 * B
    assert len(fill(Trl(0, groups_per_batch=B, num_batches=10), 0)) == B
    pacer = Trl(4, groups_per_batch=B, num_batches=10, queue_maxsize=24)
    finish(pacer, *fill(pacer, 0)[:3])
    assert pacer.blocked(0) == "bound", "24 completions in groups of 8"


def test_verl_counts_dispatches_until_the_next_synchronisation() -> None:
    pacer = Verl(0.5, groups_per_batch=B, num_batches=10, max_in_flight=MANY)
    slots = fill(pacer, 0)
    assert len(slots) == 3, "int((theta + 1) B)"
    finish(pacer, *slots)
    assert pacer.take() == Taken((0, 1))
    assert pacer.blocked(0) == "bound", "the count is not lowered by what finishes or is taken"
    assert pacer.take() is None
    assert len(fill(pacer, 1)) == 2, "set to the one group in the queue"


def test_verl_sets_its_count_before_the_next_batch_leaves_the_queue() -> None:
    pacer = Verl(1.0, groups_per_batch=B, num_batches=10, max_in_flight=MANY)
    finish(pacer, *fill(pacer, 0))
    assert pacer.take() == Taken((0, 1))
    assert pacer.take() == Taken((2, 3)), "version 1 is committed; two groups were in the queue then"
    assert len(fill(pacer, 1)) == 2


def test_verl_runs_sixteen_groups_on_a_replica_by_default_and_never_more_than_it_counts() -> None:
    assert len(fill(Verl(1.0, groups_per_batch=64, num_batches=10), 0)) == 16
    assert len(fill(Verl(1.0, groups_per_batch=64, num_batches=10, num_replicas=3), 0)) == 48
    assert len(fill(Verl(0.0, groups_per_batch=B, num_batches=10), 0)) == B


def test_a_full_queue_of_verl_loses_its_oldest_entry() -> None:
    pacer = Verl(0.0, groups_per_batch=B, num_batches=10)
    finish(pacer, *fill(pacer, 0))
    late = Slot(9, 0, 0)
    pacer._in_flight[9] = late  # its own count keeps the queue from overflowing
    finish(pacer, late)
    assert pacer.take() == Taken((1, 9), left_out=(0,))


def test_every_ordinal_has_a_fate_or_is_left_over() -> None:
    pacer = Trl(0, groups_per_batch=B, num_batches=2, max_in_flight=3)
    slots = fill(pacer, 0)
    finish(pacer, *slots[:2])
    assert pacer.take() == Taken((0, 1))
    finish(pacer, slots[2])
    slots = fill(pacer, 1)
    finish(pacer, *slots[:2])
    assert pacer.take() == Taken((3, 4), left_out=(2,))
    assert pacer.blocked(2) == "done"
    assert pacer.leftover() == (5,)


@pytest.mark.parametrize("rival", [Areal, Trl, Verl])
def test_a_rival_runs_in_the_simulator_and_sees_the_staleness_that_is_measured(rival: type[Areal | Trl | Verl]) -> None:
    steps = 30
    pacer = rival(2, groups_per_batch=16, num_batches=steps, max_in_flight=32)
    rule = setup(16, steps, max_groups_per_replica=NO_BOUND, max_staleness=NO_BOUND)
    result = simulate(config(16, 0), rule, pacer=pacer)
    assert result.num_trained == 16 * steps
    assert result.num_dispatched == result.num_trained + sum(result.num_left_out.values()) + result.num_unfinished
    assert 0 < result.max_staleness == pacer.max_staleness_seen
    assert result.masked.tokens == 0
