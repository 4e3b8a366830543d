"""SIGTERM ends a run that goes on with 75 in every phase, also while it is only being started."""

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
from actors.errors import StoppedError
from deploy.stopping import heard, nothing_left
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
    """Ray puts it in the place of ours: the process ends with the signal's number."""
    with pytest.raises(StoppedError), heard():
        sys.exit(signal.SIGTERM)
    with pytest.raises(SystemExit, match="3"), heard():
        sys.exit(3)


def test_when_all_runs_have_ended_nothing_is_stopped() -> None:
    with heard():
        nothing_left()
        os.kill(os.getpid(), signal.SIGTERM)


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
