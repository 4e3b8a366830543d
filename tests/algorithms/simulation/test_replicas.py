"""Sequences share a replica exactly as the iteration time says, and every token has the version that sampled it."""

import pytest

from algorithms.simulation.replicas import Fleet, Group
from algorithms.slots import Slot


def group(ordinal: int, *lengths: int, replica: int = 0) -> Group:
    return Group(Slot(ordinal, 0, 0), list(lengths), replica)


def run(fleet: Fleet) -> dict[int, float]:
    """Ordinal -> when its group was complete."""
    complete = {}
    while (due := fleet.next_due()) < float("inf"):
        for done in fleet.finish_due():
            complete[done.slot.ordinal] = due
    return complete


def test_sequences_slow_one_another_down_and_speed_up_as_they_finish() -> None:
    fleet = Fleet(1, max_num_seqs=4, base_s=1.0, per_sequence_s=0.5)
    fleet.start(group(0, 2, 4), 0.0)
    # Two run: 2 s an iteration for 2 tokens; then one: 1.5 s for the 2 tokens that are left.
    assert run(fleet) == {0: 2 * 2.0 + 2 * 1.5}


def test_what_does_not_fit_queues_in_order() -> None:
    fleet = Fleet(1, max_num_seqs=2, base_s=1.0, per_sequence_s=0.0)
    fleet.start(group(0, 3, 5), 0.0)
    fleet.start(group(1, 1, 1), 0.0)
    assert run(fleet) == {0: 5.0, 1: 5.0}  # at 3 the first slot is free, at 4 again
    assert fleet.num_running == 0


def test_replicas_do_not_touch_one_another() -> None:
    fleet = Fleet(2, max_num_seqs=1, base_s=1.0, per_sequence_s=1.0)
    fleet.start(group(0, 3), 0.0)
    fleet.start(group(1, 2, replica=1), 1.0)
    assert run(fleet) == {0: 6.0, 1: 5.0}


def test_a_late_arrival_slows_those_that_run() -> None:
    fleet = Fleet(1, max_num_seqs=2, base_s=1.0, per_sequence_s=1.0)
    fleet.start(group(0, 4), 0.0)
    fleet.start(group(1, 1), 4.0)  # 2 of 4 tokens are done; together they take 3 s for one
    assert run(fleet) == {1: 7.0, 0: 9.0}


def test_tokens_belong_to_the_version_that_completed_them() -> None:
    fleet = Fleet(1, max_num_seqs=2, base_s=1.0, per_sequence_s=0.0)
    first, second = group(0, 10), group(1, 2)
    fleet.start(first, 0.0)
    fleet.swap_all(2.5)
    fleet.start(second, 3.0)
    fleet.swap_all(4.0)
    run(fleet)
    assert first.tokens == {0: 2, 1: 2, 2: 6}
    assert first.seconds == {0: 2.5, 1: 1.5, 2: 6.0}
    assert second.tokens == {1: 1, 2: 1}


def test_a_stopped_group_has_cost_what_ran_and_leaves_its_slots_to_others() -> None:
    fleet = Fleet(1, max_num_seqs=2, base_s=1.0, per_sequence_s=0.0)
    stopped, other = group(0, 1, 10, 10), group(1, 2)
    fleet.start(stopped, 0.0)
    fleet.start(other, 0.0)
    fleet.finish_due()
    assert fleet.stop(stopped, 4.5)
    assert not fleet.stop(stopped, 4.5), "it is gone"
    assert stopped.tokens == {0: 1 + 4 + 3}
    assert sum(stopped.seconds.values()) == 1 + 4.5 + 3.5
    assert run(fleet) == {1: 6.5}


def test_a_draining_replica_starts_nothing_before_its_swap() -> None:
    fleet = Fleet(1, max_num_seqs=1, base_s=1.0, per_sequence_s=0.0)
    running, queued = group(0, 3), group(1, 2)
    fleet.start(running, 0.0)
    fleet.start(queued, 0.0)
    fleet.hold(0)
    assert fleet.drained == []
    fleet.finish_due()
    assert (fleet.drained, fleet.num_running, fleet.num_held) == ([0], 0, 1)
    fleet.swap(0, 5.0)
    assert run(fleet) == {1: 7.0}
    assert (running.tokens, queued.tokens) == ({0: 3}, {1: 2})


def test_a_dead_replica_gives_back_its_groups_with_their_cost() -> None:
    fleet = Fleet(2, max_num_seqs=1, base_s=1.0, per_sequence_s=0.0)
    running, queued, elsewhere = group(0, 9), group(1, 9), group(2, 9, replica=1)
    for each in (running, queued, elsewhere):
        fleet.start(each, 0.0)
    assert fleet.fail(0, 3.0) == [running, queued]
    assert (running.tokens, queued.tokens, fleet.num_alive, fleet.num_running) == ({0: 3}, {}, 1, 1)
    fleet.recover(0, 0, 4.0)
    fleet.start(group(3, 2), 5.0)
    assert run(fleet) == {3: 7.0, 2: 9.0}


def test_rounding_makes_no_second_event() -> None:
    fleet = Fleet(1, max_num_seqs=3, base_s=0.1, per_sequence_s=0.07)
    fleet.start(group(0, 7, 7, 7), 0.3)
    fleet.swap_all(0.7)
    done = fleet.next_due()
    assert [each.slot.ordinal for each in fleet.finish_due()] == [0]
    assert done == pytest.approx(0.3 + 7 * (0.1 + 3 * 0.07))
