"""Before a pod ends, the run in it is asked to stop, and is waited for."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.drain import drain, is_driver

STOPS = """
import signal, sys, time
def stop(*_):
    time.sleep(0.3)
    open(sys.argv[1], "w").write("checkpoint")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""
STAYS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_run_is_waited_for_until_its_checkpoint_is_there(tmp_path: Path) -> None:
    with started(STOPS, str(tmp_path / "cut")) as run:
        assert drain([psutil.Process(run.pid)], within_s=30.0) == 0
        assert (tmp_path / "cut").read_text() == "checkpoint"


def test_a_run_that_does_not_stop_is_counted_when_the_time_is_over() -> None:
    with started(STAYS) as run:
        try:
            assert drain([psutil.Process(run.pid)], within_s=0.3) == 1
        finally:
            run.kill()


def test_who_has_ended_meanwhile_is_not_waited_for() -> None:
    run = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(run.pid)
    run.wait(30)
    assert drain([process], within_s=5.0) == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/usr/bin/python", "-m", "deploy", "train", "recipes/demo.yaml"], True),
        (["python", "-m", "deploy", "plan", "recipes/demo.yaml"], False),
        (["/bin/sh", "-c", "python -m deploy train recipes/demo.yaml"], False),
        (["python", "-m", "deploy.drain", "--within-s", "570"], False),
        (["raylet"], False),
        ([], False),
    ],
)
def test_the_run_is_told_by_its_command_line(argv: list[str], expected: bool) -> None:
    assert is_driver(argv) == expected
