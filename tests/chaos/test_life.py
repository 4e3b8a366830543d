"""A driver whose disk is full can still say so."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.chaos.life import Life

_WRITER = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, b"a warning\\n" * 2000)
print("written", flush=True)
sys.stdin.readline()
try:
    with open(sys.argv[1] + ".other", "wb") as other:
        other.write(bytes(10_000))
except OSError as error:
    os.write(log, f"error: {error}\\n".encode())
    sys.exit(1)
"""


def test_the_cause_is_said_in_a_log_that_was_longer_than_the_disk(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "written\n"
        life = Life("light", tmp_path, log, tmp_path / "recipe.yaml")
        life._process = SimpleNamespace(pid=driver.pid, exitcode=1)
        assert life.fill_disk(8192)
        driver.communicate("\n", timeout=30)
    assert driver.returncode == 1
    assert "File too large" in log.read_text()
    assert life.untyped() is None


def test_what_was_said_before_counts_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last)\n")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as driver:
        life = Life("light", tmp_path, log, tmp_path / "recipe.yaml")
        life._process = SimpleNamespace(pid=driver.pid, exitcode=1)
        assert life.fill_disk(8192)
        driver.communicate("\n", timeout=30)
    assert log.read_text() == ""
    assert life.untyped() == "exit code 1 with a traceback"


@pytest.mark.parametrize(
    ("code", "asked", "killed", "typed"),
    [
        (0, False, False, True),
        (0, True, False, True),
        (75, True, False, True),
        (75, False, False, False),
        (-15, True, False, False),
        (-9, False, True, True),
        (-9, True, False, False),
        (130, True, False, False),
    ],
)
def test_an_end_is_one_that_the_command_line_promises(
    code: int, asked: bool, killed: bool, typed: bool, tmp_path: Path
) -> None:
    life = Life("light", tmp_path, tmp_path / "log", tmp_path / "recipe.yaml")
    life.asked_to_stop, life.killed_by_us = asked, killed
    life._process = SimpleNamespace(pid=1, exitcode=code)
    assert (life.untyped() is None) == typed
