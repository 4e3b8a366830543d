"""A run's name leads to one job at a time, and its exit code is the run's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.jobs.attempts import NAME, Attempt, check_name, job_id, next_number, of_run, parse_id

names = st.from_regex(NAME, fullmatch=True)


@given(names, st.integers(1, 10_000))
def test_an_id_leads_back_to_the_run_and_the_attempt(run: str, number: int) -> None:
    assert parse_id(job_id(run, number)) == (run, number)


@given(names, names, st.integers(1, 99), st.integers(1, 99))
def test_no_two_attempts_share_an_id(one: str, other: str, first: int, second: int) -> None:
    assert (job_id(one, first) == job_id(other, second)) == ((one, first) == (other, second))


@pytest.mark.parametrize("job", ["", "raysubmit_Xe7", "my-run.1", "my-run.0", "my-run.02", "my-run.", "My-run", ".2"])
def test_other_ids_are_no_runs(job: str) -> None:
    assert parse_id(job) is None


@pytest.mark.parametrize("name", ["", "My-Run", "a" * 48, "-a", "a-", "a.2", "a b", "a/b", "../a", "a\n"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name of a run"):
        check_name(name)


def test_the_next_attempt_has_a_number_that_none_had() -> None:
    mine = of_run("a", [Attempt("a", 4, "FAILED"), Attempt("b", 9, "FAILED"), Attempt("a", 2, "STOPPED")])
    assert [each.number for each in mine] == [2, 4]
    assert next_number(mine) == 5
    assert next_number([]) == 1


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("STOPPED", None, 75),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
    ],
)
def test_the_exit_code_is_the_runs(state: str, driver: int | None, code: int | None) -> None:
    assert Attempt("a", 1, state, driver_exit_code=driver).exit_code == code
