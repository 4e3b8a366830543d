"""The first signal ends a run in order, a second Ctrl-C at once; outside of that Ctrl-C is Python's own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RUN = """
import asyncio, sys
from actors.run.signals import on_signal

async def told(what):
    print(what, flush=True)
    await asyncio.sleep(20)

async def run():
    asked = asyncio.Event()

    async def stop():
        asked.set()

    if sys.argv[1] == "starting":
        await told("here")
    with on_signal(stop, lambda text: print(text.partition(":")[0], flush=True)):
        print("here", flush=True)
        await asyncio.wait_for(asked.wait(), 20)
        if sys.argv[1] == "finishing":
            await told("stopping")
    if sys.argv[1] == "over":
        await told("over")
    sys.exit(75)

try:
    asyncio.run(run())
except KeyboardInterrupt:
    sys.exit(130)  # as the command line does
"""


@pytest.mark.parametrize(
    ("phase", "signals", "code", "said"),
    [
        ("starting", [signal.SIGINT], 130, "here"),
        ("training", [signal.SIGINT], 75, "here SIGINT"),
        ("training", [signal.SIGTERM], 75, "here SIGTERM"),
        ("finishing", [signal.SIGINT, signal.SIGINT], 130, "here SIGINT stopping"),
        ("over", [signal.SIGINT, signal.SIGINT], 130, "here SIGINT over"),
    ],
)
def test_what_a_signal_does(phase: str, signals: list[signal.Signals], code: int, said: str) -> None:
    command = [sys.executable, "-c", RUN, phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = []
        for number in signals:
            while (line := process.stdout.readline().strip()) in ("SIGINT", "SIGTERM"):
                lines.append(line)
            lines.append(line)
            process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert " ".join([*lines, *rest.split()]) == said
