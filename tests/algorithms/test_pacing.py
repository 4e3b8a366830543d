"""The pacer's single decisions, one at a time; test_schedules.py proves them over arbitrary interleavings."""

import pytest

from algorithms.pacing import Pacer
from algorithms.slots import Slot, Taken


def fill(pacer: Pacer, version: int) -> list[Slot]:
    slots = []
    while (slot := pacer.dispatch(version)) is not None:
        slots.append(slot)
    return slots


def finish(pacer: Pacer, slots: list[Slot], newest: int | None = None) -> None:
    for slot in slots:
        assert pacer.finished(slot, slot.version, slot.version if newest is None else newest)


def test_zero_staleness_is_synchronous() -> None:
    pacer = Pacer(groups_per_batch=4, max_staleness=0, num_batches=2)
    slots = fill(pacer, 0)
    assert len(slots) == 4
    finish(pacer, slots[:3])
    assert pacer.waiting() == "groups"
    finish(pacer, slots[3:])
    assert pacer.take() == Taken((0, 1, 2, 3))
    assert pacer.blocked(0) == "bound", "nothing may be sampled from version 0 once version 1 is being made"
    assert len(fill(pacer, 1)) == 4
    assert pacer.blocked(1) == "done"


def test_the_step_waits_for_the_oldest_group_and_for_no_other() -> None:
    pacer = Pacer(groups_per_batch=2, max_staleness=1, num_batches=10)
    straggler, *others = fill(pacer, 0)
    assert len(others) == 3
    finish(pacer, others)
    assert pacer.take() == Taken((1, 2)), "the straggler may still be trained at version 1"
    finish(pacer, fill(pacer, 0) + fill(pacer, 1))
    assert pacer.num_ready >= 2
    assert pacer.waiting() == "oldest", "at version 1 the straggler of version 0 is due"
    finish(pacer, [straggler])
    batch = pacer.take()
    assert batch is not None
    assert straggler.ordinal in batch.batch


def test_requeue_aborts_the_straggler_and_samples_its_prompt_again() -> None:
    pacer = Pacer(groups_per_batch=2, max_staleness=1, num_batches=10, when_stale="requeue")
    straggler, *others = fill(pacer, 0)
    finish(pacer, others)
    assert pacer.take() == Taken((1, 2))
    finish(pacer, fill(pacer, 1))
    taken = pacer.take()
    assert taken is not None, "the step does not wait"
    assert taken.requeued == (straggler,)
    assert not pacer.finished(straggler, 0, 1), "its late report is refused"
    assert pacer.dispatch(2) == Slot(straggler.ordinal, attempt=1, version=2)


def test_mask_trains_a_group_that_straddles_more_versions_than_the_bound() -> None:
    pacer = Pacer(groups_per_batch=2, max_staleness=1, num_batches=10, when_stale="mask", pipeline_depth=4)
    straggler, *others = fill(pacer, 0)
    finish(pacer, others)
    for version in (1, 2, 3):
        taken = pacer.take()
        assert taken is not None
        assert taken.left_out == ()
        finish(pacer, fill(pacer, version))
    assert pacer.finished(straggler, 0, 3)
    taken = pacer.take()
    assert taken is not None
    assert straggler.ordinal == taken.batch[0], "the oldest goes first"


def test_mask_leaves_out_a_group_without_a_fresh_token() -> None:
    pacer = Pacer(groups_per_batch=1, max_staleness=1, num_batches=10, when_stale="mask")
    slow, other = fill(pacer, 0)
    finish(pacer, [other])
    for version in (1, 2, 3):
        assert pacer.take() is not None
        finish(pacer, fill(pacer, version))
    assert pacer.finished(slow, 0, 0), "its reward took three versions"
    taken = pacer.take()
    assert taken is not None
    assert taken.left_out == (slow.ordinal,)
    assert pacer.left_out_cause == "stale"


def test_over_sampling_fills_the_batch_of_a_synchronous_run_although_groups_are_filtered() -> None:
    pacer = Pacer(groups_per_batch=4, max_staleness=0, num_batches=2, over_sampling=1.5)
    slots = fill(pacer, 0)
    assert len(slots) == 6
    assert pacer.dropped(slots[0])
    finish(pacer, slots[2:])
    assert pacer.waiting() == "oldest", "which groups are trained must not hang on how long they took"
    finish(pacer, slots[1:2])
    assert pacer.take() == Taken((1, 2, 3, 4), left_out=(5,))
    assert pacer.left_out_cause == "surplus"


def test_an_interrupted_group_goes_on_first_and_keeps_its_deadline() -> None:
    pacer = Pacer(groups_per_batch=2, max_staleness=1, num_batches=10)
    first, second, *others = fill(pacer, 0)
    finish(pacer, others)
    assert pacer.take() is not None
    assert pacer.interrupted(first, 0)
    assert pacer.interrupted(second, None), "without a token there is nothing to resume"
    resumed, anew = fill(pacer, 1)[:2]
    assert resumed == Slot(first.ordinal, attempt=1, version=0, resumed=True)
    assert anew == Slot(second.ordinal, attempt=1, version=1)
    assert not pacer.finished(first, 0, 0), "the interrupted attempt is over"
    finish(pacer, [*fill(pacer, 1), anew])
    assert pacer.waiting() in ("oldest", "groups"), "the resumed group is due at version 1"
    finish(pacer, [resumed], newest=1)
    taken = pacer.take()
    assert taken is not None
    assert taken.batch[0] == resumed.ordinal


def test_a_late_duplicate_is_refused() -> None:
    pacer = Pacer(groups_per_batch=1, max_staleness=0, num_batches=1)
    first = pacer.dispatch(0)
    assert first is not None
    assert pacer.failed(first)
    second = pacer.dispatch(0)
    assert second == Slot(ordinal=0, attempt=1, version=0)
    assert not pacer.finished(first, 0, 0)
    assert pacer.finished(second, 0, 0)
    assert not pacer.failed(second)


def test_tokens_older_than_the_dispatch_are_an_error() -> None:
    pacer = Pacer(groups_per_batch=1, max_staleness=1, num_batches=1, version=3)
    slot = pacer.dispatch(3)
    assert slot is not None
    with pytest.raises(ValueError, match="never committed"):
        pacer.finished(slot, 2, 3)


def test_what_is_left_over_at_the_end_is_named() -> None:
    pacer = Pacer(groups_per_batch=2, max_staleness=0, num_batches=1, over_sampling=2.0, when_stale="requeue")
    slots = fill(pacer, 0)
    assert len(slots) == 4
    finish(pacer, slots[1:3])
    assert pacer.take() == Taken((1, 2), requeued=(slots[0], slots[3]))
    assert pacer.exhausted
    assert pacer.leftover() == (0, 3)
