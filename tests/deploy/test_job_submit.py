"""`ray job submit --working-dir . -- python -m deploy train` works against a Ray head, with token authentication."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.checkpoint.store import CheckpointStore
from actors.journal import fates, read
from tests.chaos.recipe import write_recipe
from tests.prove import ONLY_PROVE

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of our own: the address of its job server, and the environment that its users have."""
    port, dashboard = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        "--num-cpus=4", "--node-ip-address=127.0.0.1", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with (tmp_path / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_port(dashboard, process, deadline_s=90.0)
        yield f"http://127.0.0.1:{dashboard}", env
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_port(port: int, process: subprocess.Popen[bytes], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Ray head did not start"
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"the job server did not come up in {deadline_s:g} s")


def submit(
    address: str, env: dict[str, str], *command: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again while the head's agent is still starting."""
    deadline = time.monotonic() + 60.0
    while True:
        result = subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", *options, "--", *command],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        if "No available agent" not in result.stderr or time.monotonic() > deadline:
            return result
        time.sleep(2.0)


@pytest.mark.cluster
def test_a_submitted_job_trains(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = ("recipes/demo.yaml", f"run_dir={run}", "steps=2", "groups_per_batch=2")
    model = "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}"
    result = submit(*head, "python", "-m", "deploy", "train", *recipe, model)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "demo  2/2" in result.stdout, "the job's progress reaches the one who submitted it"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weight_version"] == 2
    assert summary["groups_lost"] == 0


def job(address: str, env: dict[str, str], *words: str) -> str:
    """What `ray job ...` says."""
    command = [str(BIN / "ray"), "job", words[0], "--address", address, *words[1:]]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


OURS = re.compile(r"ray::\w*(Policy|Rollout|Reward|Reference)|EngineCore|chaos\.driver")


def held(head: psutil.Process) -> list[str]:
    """Processes of the head that belong to a run."""
    names = []
    for process in head.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
    return [name for name in names if OURS.search(name)]


@pytest.mark.cluster
@pytest.mark.parametrize("engine", ["light", pytest.param("vllm", marks=ONLY_PROVE)])
def test_a_job_that_is_stopped_leaves_a_checkpoint_and_nothing_else(
    head: tuple[str, dict[str, str]], tmp_path: Path, engine: str
) -> None:
    """`ray job stop` sends SIGTERM, and kills after RAY_JOB_STOP_WAIT_TIME_S, 60 s here."""
    address, env = head
    recipe = write_recipe(tmp_path, steps=2000, seed=0, num_replicas=1, engine=engine)
    journal, run = tmp_path / "run" / "ledger.jsonl", tmp_path / "run"
    command = ("python", "-m", "tests.chaos.driver", engine, str(recipe))
    submitted = submit(address, env, *command, options=("--no-wait", "--submission-id", "stopped"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    deadline = time.monotonic() + 200.0
    while not journal.exists() or sum(fates(read(journal)).trained.values()) < 8:
        assert time.monotonic() < deadline, job(address, env, "logs", "stopped")
        time.sleep(0.5)
    (ray_head,) = (child for child in psutil.Process().children() if "--head" in child.cmdline())
    assert held(ray_head)
    began = time.monotonic()
    job(address, env, "stop", "stopped")
    assert time.monotonic() - began < 60.0, "it did not have to be killed"
    said = job(address, env, "logs", "stopped")
    assert "SIGTERM: the run stops after the step under way and leaves a checkpoint" in said
    stopped = re.search(r"stopped after (\d+) of 2000 steps; the same command goes on", said)
    assert stopped is not None, said
    assert CheckpointStore(run / "checkpoints").versions()[-1] == int(stopped[1])
    assert "STOPPED" in job(address, env, "status", "stopped").upper()
    deadline = time.monotonic() + 30.0
    while held(ray_head):
        assert time.monotonic() < deadline, held(ray_head)
        time.sleep(0.5)
