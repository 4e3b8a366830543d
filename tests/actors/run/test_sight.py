"""A run that stalls says so, whatever goes wrong with looking at its workers."""

from pathlib import Path

import pytest

from actors.deadline import DeadlineError
from actors.run.sight import Member, Sight, StallError, look, suspected
from actors.run.suspect import POLICY, Pending


class NoHandle:
    """Of which nothing can be asked: every question is an AttributeError, which no deadline and no Ray error is."""


async def test_a_failure_in_looking_does_not_hide_that_the_run_stalls(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "stall.txt"

    async def looks(reason: str) -> Sight:
        pending = [Pending(7, 0, 0, 60.0)]
        return await look([Member(POLICY, 0, NoHandle())], pending, reason, {"version": "5"}, path, said.append)

    with pytest.raises(StallError, match="the policy step took longer than 3 s: no worker could be looked at; see"):
        async with suspected(looks, path):
            raise DeadlineError("the policy step took longer than 3 s")
    assert "the workers could not be looked at (AttributeError: " in said[0]
    text = path.read_text()
    for part in ("version: 5", "group 7 (attempt 0)", "the workers could not be looked at: AttributeError: "):
        assert part in text
    _, driver = text.split("== driver: what its tasks wait for\n")
    assert f"({__file__}:" in driver  # where this very task stands
