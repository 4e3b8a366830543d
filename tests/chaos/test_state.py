"""A campaign that was killed goes on where it was, and never with the results of other code."""

import math
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.__main__ import Batch, How, batches, campaign, main
from tests.chaos.result import Result
from tests.chaos.run import Outcome
from tests.chaos.state import State, code_id


def result(**counts: int) -> Result:
    return Result(outcomes=[Outcome("reward raises", 1.5, True)], lives=2, groups=8, **counts)


def test_what_was_noted_is_done(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "state.jsonl"
    State(path, "code 1").note("light 60 0", result(recovery_steps_max=4))
    again = State(path, "code 1")
    assert again.done("light 60 0") == result(recovery_steps_max=4)
    assert again.done("light 60 1000") is None


def test_a_line_that_was_torn_is_a_batch_that_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    state = State(path, "code 1")
    state.note("first", result())
    state.note("second", result())
    path.write_bytes(path.read_bytes()[:-20])
    again = State(path, "code 1")
    assert again.done("first") is not None
    assert again.done("second") is None
    again.note("second", result(lost=1))
    assert State(path, "code 1").done("second") == result(lost=1)


def test_results_of_other_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state.jsonl"
    State(path, "code 1").note("first", result())
    with pytest.raises(ValueError, match="ran on the code of code 1, and this is code 2; remove it"):
        State(path, "code 2")
    with pytest.raises(SystemExit) as ended:
        main(["--faults", "3", "--state", str(path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: its batches ran on the code of code 1")


def test_a_campaign_does_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time it is killed in the second batch."""
    todo = batches(num_faults=200, num_vllm=20, seed=5)
    assert sum(batch.faults for batch in todo) == 200
    assert len({batch.seed for batch in todo}) == len(todo)
    begun: list[int] = []

    def inject(batch: Batch, how: object) -> Result:
        begun.append(todo.index(batch))
        if len(begun) == 2:
            raise KeyboardInterrupt
        found = result(duplicated=1)
        found.outcomes *= batch.faults
        return found

    monkeypatch.setattr("tests.chaos.__main__.inject", inject)
    how = How(0.2, "", math.inf, tmp_path, Console(quiet=True))
    path = tmp_path / "state.jsonl"
    with pytest.raises(KeyboardInterrupt):
        campaign(todo, how, State(path, "code"))
    whole = campaign(todo, how, State(path, "code"))
    assert begun == [0, 1, *range(1, len(todo))]
    assert (len(whole.outcomes), whole.duplicated) == (200, len(todo))
    assert campaign(todo, how, State(path, "code")) == whole
    assert begun == [0, 1, *range(1, len(todo))], "all is done"


def test_a_batch_whose_faults_have_not_all_struck_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.chaos.__main__.inject", lambda batch, how: result())
    monkeypatch.setattr("tests.chaos.__main__.preload", lambda: None)
    path = tmp_path / "state.jsonl"
    with pytest.raises(SystemExit) as ended:
        main(["--faults", "3", "--state", str(path), "--work", str(tmp_path)])
    assert ended.value.code == 1
    assert "error: 1 of 3 faults struck" in capsys.readouterr().err
    assert len(path.read_text().splitlines()) == 1, "the line that names the code alone"


def test_the_code_is_the_commit_and_what_was_changed_since(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert code_id(tmp_path) == "no commit"
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    first = code_id(tmp_path)
    assert len(first) == 40
    (tmp_path / "file").write_text("two")
    changed = code_id(tmp_path)
    assert changed.startswith(f"{first} with changes ")
    (tmp_path / "file").write_text("three")
    assert code_id(tmp_path) != changed
