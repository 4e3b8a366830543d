"""The suspect of a stall is who cannot go on by itself; among equals, who stands furthest down the chain."""

import pytest

from actors.run.suspect import (
    POLICY,
    REFERENCE,
    REPLICA,
    REWARD,
    Pending,
    Process,
    Worker,
    place,
    report,
    sentence,
    suspect,
)

IDLE_STACK = 'Python v3.11\n\nThread 1 (idle): "MainThread"\n    main_loop (/x/ray/_private/worker.py:9)\n'
SLOW_STACK = (
    'Python v3.11\n\nThread 7 (idle): "MainThread"\n    slow (/home/me/recipes/x.py:12)\n'
    "    called (/p/actors/rewards/child.py:80)\n    <module> (/p/actors/rewards/child.py:149)\n"
    'Thread 8 (active): "other"\n    busy (/p/y.py:1)\n'
)
WAITING_STACK = SLOW_STACK.replace("slow (/home/me/recipes/x.py:12)", "_wait (/p/actors/rewards/pipe.py:59)")
CHILD = "python -m actors.rewards.child"


def worker(
    role: str, number: int = 0, *, alive: bool = True, answers: bool = True, state: str = "S", stack: str = IDLE_STACK
) -> Worker:
    return Worker(role, number, "10.0.0.2", alive, answers, (Process(100 + number, "ray::Actor", state, stack),))


def reward(number: int = 0, *, child_stack: str = WAITING_STACK, child_state: str = "S") -> Worker:
    own = Process(200 + number, "ray::RewardActor", "S", IDLE_STACK)
    child = Process(300 + number, CHILD, child_state, child_stack)
    return Worker(REWARD, number, "10.0.0.3", alive=True, answers=True, processes=(own, child))


def pending(ordinal: int = 0, replica: int = 0) -> Pending:
    return Pending(ordinal, 0, replica, 60.0)


def test_a_slow_reward_function_is_named_with_its_line() -> None:
    workers = [worker(POLICY), worker(REPLICA), reward(child_stack=SLOW_STACK)]
    assert sentence(workers, [pending()], "no group finished for 60 s") == (
        "no group finished for 60 s: reward worker 0 (pid 200, node 10.0.0.3) is in slow, /home/me/recipes/x.py:12"
    )


def test_when_nobody_could_be_looked_at_nobody_is_blamed() -> None:
    assert sentence([], [pending()], "it took too long") == "it took too long: no worker could be looked at"


def test_the_reward_worker_of_the_group_is_meant_and_no_other() -> None:
    workers = [worker(REPLICA), reward(0, child_stack=SLOW_STACK), reward(1, child_stack=SLOW_STACK)]
    found = suspect(workers, [pending(ordinal=3)])
    assert found is not None
    assert (found[0].role, found[0].number) == (REWARD, 1)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (worker(REPLICA, 1, alive=False), "is dead"),
        (worker(REPLICA, 1, answers=False, state="T"), "is stopped (state T: a signal holds it)"),
        (worker(REPLICA, 1, answers=False), "does not answer"),
        (reward(0, child_state="T"), "is stopped in its process 300 (state T: a signal holds it)"),
        (
            worker(REFERENCE, 0, answers=False, stack=SLOW_STACK),
            "does not answer: it is in slow, /home/me/recipes/x.py:12",
        ),
    ],
)
def test_who_cannot_go_on_weighs_more_than_who_has_the_group(bad: Worker, why: str) -> None:
    fine = [worker(REPLICA, 0), worker(REPLICA, 1), worker(REFERENCE, 0), reward(0)]
    workers = [w for w in fine if (w.role, w.number) != (bad.role, bad.number)] + [bad]
    assert suspect(workers, [pending(0, replica=0), pending(1, replica=1)]) == (bad, why)


def test_dead_weighs_more_than_stopped_and_stopped_more_than_silent() -> None:
    dead = worker(REPLICA, 0, alive=False)
    stopped = worker(REWARD, 0, answers=False, state="T")
    silent = worker(REFERENCE, 0, answers=False)
    held = [pending(0, replica=0)]
    for workers, expected in (([silent, stopped, dead], dead), ([silent, stopped], stopped), ([silent], silent)):
        found = suspect(workers, held)
        assert found is not None
        assert found[0] is expected


def test_among_equals_the_others_wait_for_the_one_down_the_chain() -> None:
    silent = [worker(REPLICA, answers=False), worker(REWARD, answers=False), worker(REFERENCE, answers=False)]
    found = suspect(silent, [pending()])
    assert found is not None
    assert found[0].role == REWARD


def test_a_policy_rank_that_steps_is_no_suspect_while_groups_are_waited_for() -> None:
    workers = [worker(POLICY, answers=False, stack=SLOW_STACK), worker(REPLICA), reward()]
    found = suspect(workers, [pending()])
    assert found is not None
    assert found[0].role == REPLICA
    assert found[1] == "answers, and still has the group"


def test_when_the_policy_is_late_and_no_group_is_there_its_rank_is_named() -> None:
    workers = [worker(POLICY, 0), worker(POLICY, 1, answers=False, stack=SLOW_STACK), reward()]
    told = sentence(workers, [], "the policy step at version 3 took longer than 60 s")
    assert told.endswith(
        "policy rank 1 (pid 101, node 10.0.0.2) does not answer: it is in slow, /home/me/recipes/x.py:12"
    )


def test_nobody_is_accused_when_nothing_speaks_against_anybody() -> None:
    assert suspect([worker(POLICY), reward()], []) is None
    assert "the schedule itself is stuck" in sentence([worker(POLICY), reward()], [], "no group finished")


@pytest.mark.parametrize(
    ("stack", "where"),
    [
        (SLOW_STACK, "slow, /home/me/recipes/x.py:12"),
        (WAITING_STACK, ""),
        (IDLE_STACK, ""),
        ("no stack: py-spy: Permission denied", ""),
        ("", ""),
    ],
)
def test_the_place_is_the_innermost_frame_of_the_main_thread(stack: str, where: str) -> None:
    assert place(stack) == where


def test_the_report_holds_all_that_was_seen() -> None:
    workers = [worker(REPLICA), reward(child_stack=SLOW_STACK)]
    text = report("no group finished", workers, [pending(4)], {"the committed version is": "7"})
    for part in (
        "is in slow",
        "the committed version is: 7",
        "group 4 (attempt 0)",
        "pid 300, state S",
        "busy (/p/y.py:1)",
    ):
        assert part in text


def test_where_py_spy_may_not_look_the_workers_own_account_is_told() -> None:
    own = Process(1, "ray::RewardActor", "S", "no stack: py-spy: Permission denied")
    told = Worker(REWARD, 0, "10.0.0.3", alive=True, answers=True, processes=(own,), account="Thread MainThread")
    text = report("no group finished", [told], [], {})
    assert "no stack: py-spy: Permission denied\n-- its own account:\nThread MainThread" in text
