"""A driver whose event loop hangs ends with a sentence; one that is only slow, or was stopped, goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER = """
import asyncio, os, sys, time
from pathlib import Path
from actors.run import pulse

pulse._BEAT_S, pulse._MOST_MISSED = 0.1, 5

def hangs_at_its_disk():
    time.sleep(60)

def hangs_at_its_reader():
    while True:
        os.write(1, b"progress" * 10_000)

async def goes_on():
    for _ in range(15):
        time.sleep(0.2)  # slow, and back on the loop in time
        await asyncio.sleep(0.15)

async def main():
    async with pulse.pulse_watched(Path(sys.argv[2])):
        done = globals()[sys.argv[1]]()
        if done is not None:
            await done

asyncio.run(main())
print("done")
"""


def driver(what: str, stall: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, what, str(stall)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("what", ["hangs_at_its_disk", "hangs_at_its_reader"])
def test_a_loop_that_hangs_is_named_and_ended(what: str, tmp_path: Path) -> None:
    stall = tmp_path / "stall.txt"
    with driver(what, stall) as process:
        assert process.wait(30.0) == 1
        assert process.stderr is not None
        told = process.stderr.read()
    assert told.startswith(f"error: the driver's event loop has hung for 0.5 s in {what} (<string>:")
    assert f"see {stall}" in told
    assert told.count("\n") == 1
    text = stall.read_text()
    assert text.startswith(told)
    assert f"in {what}" in text
    assert "Thread pulse" in text


def test_a_disk_that_takes_no_last_words_does_not_keep_it(tmp_path: Path) -> None:
    stall = tmp_path / "stall.txt"
    os.mkfifo(stall)  # whoever opens it waits for a reader
    with driver("hangs_at_its_disk", stall) as process:
        assert process.wait(30.0) == 1


def test_a_slow_loop_goes_on_and_so_does_one_that_was_stopped(tmp_path: Path) -> None:
    stall = tmp_path / "stall.txt"
    with driver("goes_on", stall) as process:
        time.sleep(1.0)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        told, _ = process.communicate(timeout=30.0)
    assert process.returncode == 0
    assert told == "done\n"
    assert not stall.exists()
