"""Whatever goes wrong in a check is its finding, on one line, by its deadline."""

import time
from collections.abc import Callable

import pytest

from actors.errors import RunError
from deploy.doctor.check import Check, Finding, failed, found_by, passed


def raising(error: Exception) -> Callable[[], Finding]:
    def look() -> Finding:
        raise error

    return look


def test_what_a_check_finds_is_told_with_its_fix() -> None:
    assert found_by(Check("x", 10.0, lambda: passed("all is well"))) == Finding("pass", "all is well")
    assert failed("it is full", "make room").line == "it is full; make room"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("dataset.path: there is no file x; correct it"), "dataset.path: there is no file x; correct it"),
        (RunError("--address auto: nobody"), "--address auto: nobody"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (KeyError(), "KeyError: KeyError"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
        (ValueError("two\nlines"), "two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_a_check_raises_is_its_failure_on_one_line(error: Exception, line: str) -> None:
    found = found_by(Check("x", 10.0, raising(error)))
    assert (found.level, found.line) == ("fail", line)


def test_a_check_that_hangs_ends_at_its_deadline_and_is_named() -> None:
    started = time.monotonic()
    found = found_by(Check("slow", 0.2, lambda: time.sleep(30) or passed("late")))
    assert time.monotonic() - started < 10
    assert found.level == "fail"
    assert found.text == "the check 'slow' took longer than 0.2 s"
