"""What a run says is shown as it is, whatever a reward function or a prompt has put into it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.ledger import Ledger
from actors.run.progress import RunProgress
from algorithms.slots import Slot
from deploy.ledger import show

ROOT = Path(__file__).parents[3]
TEMPLATED = "KeyError: '[/INST] [red]x'"


def test_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    RunProgress("run", 1, Console()).say(f"warning: {TEMPLATED}")
    assert capsys.readouterr().out == f"warning: {TEMPLATED}\n"


def test_what_has_no_bytes_is_shown_as_its_escape(capsys: pytest.CaptureFixture[str]) -> None:
    """`json.loads` of what a model has written may hold it, and so may the error of who has read that."""
    RunProgress("run", 1, Console()).say("warning: \ud800 \u00e9")
    assert capsys.readouterr().out.encode() == b"warning: \\ud800 \xc3\xa9\n"


def test_a_run_goes_on_when_nobody_reads_what_it_prints() -> None:
    """As in `train ... | head -1`: rich would end the process without a word."""
    script = (
        "import sys; from actors.run.progress import RunConsole, RunProgress\n"
        "console = RunConsole(); run = RunProgress('run', 9, console); run.say('first'); sys.stdin.read()\n"
        "console.print('another'); [run.say('another') for _ in range(3)]; print('it goes on', file=sys.stderr)"
    )
    command = [sys.executable, "-c", script]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdout = None
        _, told = process.communicate(timeout=60.0)
    assert (process.returncode, told) == (0, "it goes on\n")


def test_brackets_in_the_journal_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.dispatched(Slot(0, 0, 0), replica=0)
        ledger.quarantined(Slot(0, 0, 0), f"{TEMPLATED} \ud800", row=3)
    assert show(tmp_path)
    shown = capsys.readouterr().out
    assert TEMPLATED in shown
    assert "\\ud800" in shown
