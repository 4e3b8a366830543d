"""A reward that fails too often ends the run; one that fails now and then does not."""

from algorithms.budgets import WINDOW, RewardBudget

FAILED = {"timeout": 1}
DETAIL = ("reward function f: timeout: took more than 1 s",)


def first_spent(budget: RewardBudget, fails: list[bool]) -> int | None:
    """The number of groups after which the budget is spent."""
    for number, failed in enumerate(fails, start=1):
        if budget.spent(FAILED if failed else {}, DETAIL if failed else ()) is not None:
            return number
    return None


def test_what_always_fails_is_told_after_the_share_of_a_window_and_one() -> None:
    for share, expected in ((0.0, 1), (0.1, 11), (0.5, 51)):
        assert first_spent(RewardBudget(share), [True] * 200) == expected


def test_all_failures_are_tolerated_at_1() -> None:
    assert first_spent(RewardBudget(1.0), [True] * 500) is None


def test_failures_within_the_share_are_tolerated_for_ever() -> None:
    assert first_spent(RewardBudget(0.1), [number % 10 == 0 for number in range(1000)]) is None


def test_failures_that_are_long_past_do_not_count() -> None:
    fails = [True] * 10 + [False] * WINDOW + [True] * 10
    assert first_spent(RewardBudget(0.1), fails) is None
    assert first_spent(RewardBudget(0.1), [*fails, True]) == len(fails) + 1


def test_the_sentence_names_the_key_the_counts_and_the_last_function_that_failed() -> None:
    budget = RewardBudget(0.02)
    budget.spent({"exception": 2}, ["reward function f: exception: no", "reward function g: exception: no"])
    budget.spent({}, [])
    budget.spent({"exception": 1, "timeout": 1}, ["reward function f: exception: no"])
    assert budget.spent({"died": 1}, ["reward function g: died: killed by SIGSEGV"]) == (
        "rewards failed in 3 of the last 4 groups (exception 3, timeout 1, died 1), more than "
        "rewards.max_failed_share allows (0.02 of 100); the last was reward function g: died: killed by SIGSEGV; mend "
        "the function, or raise the share to train without those rewards"
    )
