"""`ray job submit --working-dir . -- python -m deploy train` works against a Ray head, with token authentication."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
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


def submit(address: str, env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again while the head's agent is still starting."""
    deadline = time.monotonic() + 60.0
    while True:
        result = subprocess.run(
            [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", *command],
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
