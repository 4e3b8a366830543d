"""SIGTERM ends a run that goes on with 75 in every phase, also while it is only being started."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from actors.checkpoint.store import CheckpointStore
from actors.errors import RunError, StoppedError
from deploy.stopping import heard, nothing_left, run_to_end
from tests.deploy.test_faults import wait_for_steps
from tests.deploy.test_resume_sft import RECIPE, begin
from tests.prove import ONLY_PROVE


def stopped_at_once() -> None:
    with heard():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10.0)


def test_sigterm_before_there_is_a_run_is_a_stop() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="the same command goes on from the newest checkpoint, or begins anew"):
        stopped_at_once()
    assert signal.getsignal(signal.SIGTERM) == before


def test_rays_own_handler_says_the_same() -> None:
    """While Ray is joined, it stands in the place of ours."""
    with pytest.raises(StoppedError), heard():
        sys.exit(signal.SIGTERM)
    with pytest.raises(SystemExit, match="3"), heard():
        sys.exit(3)


def test_when_all_runs_have_ended_nothing_is_stopped() -> None:
    """Until the process is gone: a run that is done does not end as one that a signal has ended."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with heard():
            nothing_left()
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


async def fails_when_it_is_told_to_stop() -> None:
    """As a run whose raylet dies at that moment."""
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    try:
        await asyncio.sleep(10.0)
    except asyncio.CancelledError:
        raise ExceptionGroup("both", [RunError("the raylet has died")]) from None


def test_what_fails_in_a_run_that_stops_is_said_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with pytest.raises(StoppedError), heard():
        run_to_end(fails_when_it_is_told_to_stop(), said.append)
    assert said == ["warning: while it stopped: the raylet has died"]
    assert capfd.readouterr() == ("", "")


COMMAND = """
import sys, time
import deploy.train
print("loaded", flush=True)
deploy.train.prepare = lambda *_: time.sleep(60)
sys.argv = ["deploy", "train", sys.argv[1]]
from deploy.__main__ import app
app()
"""


def test_a_command_that_is_stopped_while_it_looks_at_the_recipe_ends_with_75(tmp_path: Path) -> None:
    recipe = RECIPE.format(folder=tmp_path, steps=2, every=1, policy="{}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        time.sleep(3.0)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert told.startswith("stopped; the same command goes on")


SESSION = """
import os, signal, sys, time
from deploy.session import ray_session, shut_in
shut_in(os.environ)
import ray
import deploy.session
from actors.errors import RunError, StoppedError
from deploy.stopping import heard
init, shutdown = deploy.session._init, ray.shutdown

def joined_and_stopped(address):
    init(address)
    os.kill(os.getpid(), signal.SIGTERM)  # Ray's handler is there, and ours not again yet
    time.sleep(60)

def slow():
    time.sleep(4.0)  # longer than Ray's handler lets a process live
    shutdown()

if sys.argv[1] == "joined":
    deploy.session._init, ray.shutdown = joined_and_stopped, slow
try:
    with heard():
        print("begins", flush=True)
        with ray_session(None, print):
            print("joined", flush=True)
except StoppedError:
    sys.exit(75)
"""


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.parametrize("moment", ["starting", "joined"])
def test_sigterm_while_a_local_ray_starts_ends_with_75_and_leaves_nothing(moment: str) -> None:
    process = psutil.Popen([sys.executable, "-c", SESSION, moment], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begins\n"
        seen: dict[int, psutil.Process] = {}
        deadline = time.monotonic() + 60.0
        # The raylet is there, and has begun to start agents of its own.
        while not any("agent.py" in _told(each) and "raylet/raylet" not in _told(each) for each in seen.values()):
            assert time.monotonic() < deadline, "Ray did not begin to start"
            seen |= {child.pid: child for child in process.children(recursive=True)}
            time.sleep(0.02)
        if moment == "starting":
            process.send_signal(signal.SIGTERM)
        while process.poll() is None and time.monotonic() < deadline:
            seen |= {child.pid: child for child in process.children(recursive=True)}
            time.sleep(0.1)
        said = process.stdout.read()
    finally:
        if process.poll() is None:
            process.kill()
    assert (process.returncode, said) == (75, "")
    _, left = psutil.wait_procs(list(seen.values()), timeout=15.0)
    assert [_told(each) for each in left] == []


def _told(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def stopped_when(process: psutil.Popen, ready: Callable[[str], bool]) -> str:
    """What the run says, which is sent SIGTERM at the first line that is `ready`."""
    said = []
    for line in process.stdout:
        said.append(line)
        if ready(line):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=100)
    return "".join(said) + rest


@ONLY_PROVE
@pytest.mark.cluster
def test_a_run_that_goes_on_and_is_stopped_while_it_starts_ends_with_75(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, steps=400, every=5, policy="{num_threads: 1}"))
    run = tmp_path / "run"
    first = begin(tmp_path)
    wait_for_steps(run, 8, first)
    first.kill()
    first.communicate(timeout=30)
    newest = CheckpointStore(run / "checkpoints").versions()[-1]
    for ready in (f"going on from step {newest} of 400", "starting the policy"):
        process = begin(tmp_path)
        said = stopped_when(process, lambda line, ready=ready: ready in line)
        assert process.returncode == 75, said
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith("stopped; the same command goes on"), said
    assert CheckpointStore(run / "checkpoints").versions()[-1] == newest
    again = begin(tmp_path)
    wait_for_steps(run, newest + 2, again)
    again.send_signal(signal.SIGTERM)
    said, _ = again.communicate(timeout=100)
    assert again.returncode == 75, said
    assert f"going on from step {newest} of 400" in said
