"""`python -m deploy submit` and its kin work against a real Ray head, with token authentication."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
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
SECRET = f"s3cret-{secrets.token_hex(8)}"  # in no file that is sent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of our own: the address of its job server, and the environment that it and its users have."""
    port, dashboard, sessions = free_port(), free_port(), tempfile.mkdtemp(prefix="ray-")  # sockets want short paths
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "HF_HUB_OFFLINE": "1"}
    env |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "JUDGE_KEY": SECRET,
        "RAY_TMPDIR": sessions,
    }
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
        shutil.rmtree(sessions, ignore_errors=True)


def wait_for_port(port: int, process: subprocess.Popen[bytes], deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        assert process.poll() is None, "the Ray head did not start"
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(f"the job server did not come up in {deadline_s:g} s")


def paceline(head: tuple[str, dict[str, str]], verb: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`python -m deploy <verb> ...` at the head; `more` is set in the environment."""
    address, env = head
    command = [sys.executable, "-m", "deploy", verb, *words, "--address", address]
    return subprocess.run(
        command, cwd=ROOT, env=env | more, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip


@pytest.mark.cluster
def test_a_submitted_job_trains(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """And a stranger is told so, who would submit a run, or join the cluster to train one."""
    run = tmp_path / "run"
    recipe = ("recipes/demo.yaml", f"run_dir={run}", "steps=2", "groups_per_batch=2")
    words = (*recipe, "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}")
    joining = join(head, *words, f"run_dir={tmp_path}/stranger", RAY_AUTH_TOKEN="f" * 64)
    strangers = {
        "does not take this token": {"RAY_AUTH_TOKEN": "f" * 64},
        "asks for a token, and none is set here": {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"},
    }
    for says, token in strangers.items():
        refused = paceline(head, "status", **token)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr
    result = paceline(head, "submit", *words, "--secret", "JUDGE_KEY", "--env", "HF_HUB_OFFLINE")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "submitted demo\n" in result.stdout, "it is the first of its name"
    assert "demo  2/2" in result.stdout, "the job's progress reaches the one who submitted it"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["weight_version"] == 2
    assert summary["groups_lost"] == 0
    shown = paceline(head, "status").stdout
    assert re.search(r"demo +│ 1 +│ succeeded .* 2/2 .*│ 0 ", shown), shown
    assert SECRET not in result.stdout + result.stderr + shown
    _, errors = joining.communicate(timeout=60)
    assert joining.returncode == 2, errors
    assert len(re.findall("^error: ", errors, re.MULTILINE)) == 1, errors  # beside what Ray itself warns of
    assert "has another token than the one that is set here; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in errors
    assert not (tmp_path / "stranger").exists()


def join(head: tuple[str, dict[str, str]], *words: str, **more: str) -> subprocess.Popen[str]:
    """`python -m deploy train ... --address` of the head itself; `more` is set in the environment."""
    (ray_head,) = (child for child in psutil.Process().children() if "--head" in child.cmdline())
    (port,) = (word.partition("=")[2] for word in ray_head.cmdline() if word.startswith("--port="))
    command = [sys.executable, "-m", "deploy", "train", *words, "--address", f"127.0.0.1:{port}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=head[1] | more, stdout=pipe, stderr=pipe, text=True)


OURS = re.compile(r"ray::\w*(Policy|Rollout|Reward|Reference)|EngineCore|chaos\.driver")


def held(head: psutil.Process) -> list[str]:
    """Processes of the head that belong to a run."""
    return [line for line in arguments(head) if OURS.search(line)]


@pytest.mark.cluster
@pytest.mark.parametrize("engine", ["light", pytest.param("vllm", marks=ONLY_PROVE)])
def test_a_job_that_is_stopped_leaves_a_checkpoint_and_nothing_else(
    head: tuple[str, dict[str, str]], tmp_path: Path, engine: str
) -> None:
    """Ray sends SIGTERM, and kills after what `submit` has told it, 60 s here; the head itself would after 3 s."""
    recipe = write_recipe(tmp_path, steps=2000, seed=0, num_replicas=1, engine=engine)
    journal, run = tmp_path / "run" / "ledger.jsonl", tmp_path / "run"
    send(head, f"exec python -m tests.chaos.driver {engine} {recipe}", run)
    deadline = time.monotonic() + 200.0
    while not journal.exists() or sum(fates(read(journal)).trained.values()) < 8:
        assert time.monotonic() < deadline, paceline(head, "logs", "stopped", "--no-follow").stdout
        time.sleep(0.5)
    (ray_head,) = (child for child in psutil.Process().children() if "--head" in child.cmdline())
    assert held(ray_head)
    began = time.monotonic()
    told = paceline(head, "stop", "stopped")
    assert told.returncode == 0, told.stdout + told.stderr
    assert time.monotonic() - began < 60.0, "it did not have to be killed"
    watched = paceline(head, "logs", "stopped")
    assert watched.returncode == 75, watched.stdout + watched.stderr
    assert "SIGTERM: the run stops after the step under way and leaves a checkpoint" in watched.stdout
    stopped = re.search(r"stopped after (\d+) of 2000 steps; the same command goes on", watched.stdout)
    assert stopped is not None, watched.stdout
    assert stopped[0] in told.stdout
    assert CheckpointStore(run / "checkpoints").versions()[-1] == int(stopped[1])
    deadline = time.monotonic() + 30.0
    while held(ray_head):
        assert time.monotonic() < deadline, held(ray_head)
        time.sleep(0.5)


SEND = """
import sys
from pathlib import Path
from deploy.jobs.head import Head
from deploy.jobs.shipment import pack
address, command, run_dir, archive = sys.argv[1:]
pack(Path.cwd()).write(Path(archive))
Head(address).submit("stopped", 1, command, run_dir, Path(archive), {"RAY_JOB_STOP_WAIT_TIME_S": "60"})
"""


def send(head: tuple[str, dict[str, str]], command: str, run_dir: Path) -> None:
    """What `submit` does, with another command than `train`."""
    address, env = head
    words = [sys.executable, "-c", SEND, address, command, str(run_dir), str(run_dir.parent / "project.zip")]
    subprocess.run(words, cwd=ROOT, env=env, check=True, timeout=120)


@ONLY_PROVE
@pytest.mark.cluster
def test_the_same_command_attaches_to_a_run_and_goes_on_with_one_that_was_stopped(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """With real engines; and no secret of the cluster is in a file of Ray, of the run, or in an argument."""
    run = tmp_path / "run"
    model = "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}"
    words = ("recipes/demo.yaml", f"run_dir={run}", "steps=30", "groups_per_batch=2", model, "--secret", "JUDGE_KEY")
    first = paceline(head, "submit", *words, "--no-wait")
    assert first.returncode == 0, first.stdout + first.stderr
    address, env = head
    command = [sys.executable, "-m", "deploy", "submit", *words, "--address", address]
    with (tmp_path / "watched.log").open("w") as log:
        watcher = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 200.0
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline, (tmp_path / "watched.log").read_text()
        time.sleep(0.5)
    assert "demo is running already" in (tmp_path / "watched.log").read_text()
    (ray_head,) = (child for child in psutil.Process().children() if "--head" in child.cmdline())
    told = [line for line in arguments(ray_head) if SECRET in line]
    assert paceline(head, "stop", "demo").returncode == 0
    assert watcher.wait(timeout=60) == 75
    again = paceline(head, "submit", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "submitted demo.2; attempt 2 goes on" in again.stdout
    assert re.search(r"going on from step \d+ of 30", again.stdout), again.stdout
    assert json.loads((run / "summary.json").read_text())["weight_version"] == 30
    assert [
        line.split("│")[3].strip() for line in paceline(head, "status", "demo").stdout.splitlines() if "│" in line
    ] == [
        "stopped",
        "succeeded",
    ]
    assert told == []
    assert subprocess.run(["grep", "-rlaF", SECRET, run, env["RAY_TMPDIR"]], capture_output=True).stdout == b""


def arguments(process: psutil.Process) -> list[str]:
    """The command lines of a process and all below it."""
    lines = []
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            lines.append(" ".join(each.cmdline()))
    return lines
