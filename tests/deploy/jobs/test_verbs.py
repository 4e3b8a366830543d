"""`submit`, `status`, `logs` and `stop` against a head that misbehaves: nothing runs twice, nothing bad is sent."""

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deploy.__main__ import app
from deploy.jobs import head as head_module
from deploy.jobs import stop as stop_module
from deploy.jobs import watch
from tests.deploy.jobs.fake_head import NODE, FakeHead, fake_head

ROOT = Path(__file__).parents[3]
RECIPE = """
kind: sft
name: mine
steps: 3
batch_size: 2
max_length: 64
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}}
dataset: {{path: rows.jsonl}}
run_dir: {folder}/shared/mine
pools: {{policy: {{cpus_per_worker: 2}}}}
"""


@pytest.fixture
def fake() -> Iterator[FakeHead]:
    with fake_head() as head:
        yield head


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, from which the commands are given."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine.yaml").write_text(RECIPE.format(folder=tmp_path))
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(watch, "_ASK_EVERY_S", 0.1)
    monkeypatch.setattr(head_module, "_RETRY_S", 0.1)
    monkeypatch.setattr(stop_module, "_ASK_EVERY_S", 0.05)
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    return folder


def give(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def submit(fake: FakeHead, *words: str) -> Result:
    return give("submit", "mine.yaml", *words, "--address", fake.address)


def refused(result: Result, *says: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert sum(line.startswith("error: ") for line in result.output.splitlines()) == 1, result.output
    for text in says:
        assert text in result.output, result.output


def sent(fake: FakeHead) -> list[str]:
    return [each for each in fake.requests if not each.startswith("GET")]


def test_a_job_is_the_train_command_in_a_copy_of_this_folder(
    fake: FakeHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_MODE", "quick")
    monkeypatch.setenv("MY_KEY", "s3cret-1")
    result = submit(fake, "steps=5", "--env", "MY_MODE", "--secret", "MY_KEY", "--stop-wait-s", "90", "--no-wait")
    assert result.exit_code == 0, result.output
    job = fake.jobs["mine"]
    assert job["entrypoint"].endswith("; exec python -m deploy train mine.yaml steps=5")
    env = {"MY_MODE": "quick", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    assert {name: job["runtime_env"]["env_vars"][name] for name in env} == env
    assert job["metadata"] == {"paceline_run_dir": f"{tmp_path}/shared/mine"}
    ((name, archive),) = fake.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        assert opened.namelist() == ["mine.yaml", "rows.jsonl"]
    assert "s3cret-1" not in json.dumps(fake.jobs) + result.output
    assert b"s3cret-1" not in archive
    assert f"stop: python -m deploy stop mine --address {fake.address}" in result.output


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 1}, 1),
        ({"status": "FAILED", "driver_exit_code": 75}, 75),
        ({"status": "STOPPED"}, 75),
        ({"status": "FAILED", "message": "the node was lost"}, 1),
    ],
)
def test_the_log_is_shown_and_the_exit_code_is_the_jobs(fake: FakeHead, end: dict[str, object], code: int) -> None:
    fake.logs["mine"] = "mine  1/3  loss 2.0\nmine  3/3  loss 1.0\n"
    fake.cut_after = [4]
    fake.then["mine"] = end
    result = submit(fake)
    assert result.exit_code == code, result.output
    assert fake.logs["mine"] in result.output
    assert str(end.get("message", "")) in result.output


def test_a_run_that_is_over_gets_another_attempt_and_one_that_runs_gets_none(fake: FakeHead) -> None:
    for number, state in enumerate(("FAILED", "STOPPED", "RUNNING"), start=1):
        assert submit(fake, "--no-wait").exit_code == 0
        job = "mine" if number == 1 else f"mine.{number}"
        assert list(fake.jobs)[-1] == job
        fake.jobs[job]["status"] = state
    again = submit(fake, "--no-wait")
    assert again.exit_code == 0, again.output
    assert "mine.3 is running already" in again.output
    assert list(fake.jobs) == ["mine", "mine.2", "mine.3"]
    assert len(fake.packages) == 1, "equal files are sent once"
    refused(submit(fake, "steps=9", "--no-wait"), "under way on this cluster with another command", "deploy stop mine")
    refused(submit(fake, "name=other", "--no-wait"), "run_dir", "'mine.3' trains in")
    assert len(fake.jobs) == 3


def test_a_run_that_has_finished_is_not_run_again_unless_that_is_asked_for(fake: FakeHead) -> None:
    submit(fake, "--no-wait")
    fake.jobs["mine"]["status"] = "SUCCEEDED"
    refused(submit(fake, "--no-wait"), "has finished on this cluster", "--overwrite")
    assert submit(fake, "--no-wait", "--overwrite").exit_code == 0
    assert fake.jobs["mine.2"]["entrypoint"] == "exec python -m deploy train mine.yaml --overwrite"


def test_of_two_who_submit_at_once_one_is_told_of_the_other(fake: FakeHead) -> None:
    command = "exec python -m deploy train mine.yaml"
    fake.someone_else = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": command, "start_time": 1}
    result = submit(fake, "--no-wait")
    assert result.exit_code == 0, result.output
    assert "mine is running already" in result.output
    fake.jobs.clear()
    fake.someone_else = {"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "sleep 9", "start_time": 1}
    refused(submit(fake, "--no-wait"), "with another command", "sleep 9")
    assert list(fake.jobs) == ["mine"]


def test_an_answer_that_is_lost_makes_no_second_job(fake: FakeHead) -> None:
    fake.lost_answers = 1
    result = submit(fake, "--no-wait")
    assert result.exit_code == 0, result.output
    assert list(fake.jobs) == ["mine"]


def test_the_command_that_a_cluster_s_manifest_tells_submits_the_run(
    fake: FakeHead, project: Path, tmp_path: Path
) -> None:
    """With the pools bound to the pods' resources, and the run folder on their volume."""
    (project / "recipes").mkdir()
    recipe = RECIPE.replace("rows.jsonl", "recipes/rows.jsonl").replace("run_dir: {folder}/shared/mine\n", "")
    (project / "recipes" / "mine.yaml").write_text(recipe.format())
    (project / "rows.jsonl").rename(project / "recipes" / "rows.jsonl")
    text = give("manifest", "recipes/mine.yaml", "steps=2", "--kind", "cluster", "--image", "i").output
    (line,) = (line for line in text.splitlines() if "deploy submit" in line)
    command = shlex.split(line.partition(": ")[2])
    assert command[:4] == ["python", "-m", "deploy", "submit"]
    fake.nodes = [NODE | {"resources_total": NODE["resources_total"] | {"paceline-policy": 1.0}}]
    result = give(*command[3:-1], fake.address, "--no-wait")
    assert result.exit_code == 0, result.output
    told = shlex.split(fake.jobs["mine"]["entrypoint"])
    assert told[-4:] == ["recipes/mine.yaml", "steps=2", "pools.policy.node_resource=paceline-policy",
                         "run_dir=/app/runs/mine"]  # fmt: skip
    assert fake.jobs["mine"]["metadata"] == {"paceline_run_dir": "/app/runs/mine"}


BAD: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "unknown key": (["stepz=3"], ["unknown key", "did you mean 'steps'"]),
    "bad name": (["name=My_Run"], ["name", "My_Run"]),
    "bad data": (["dataset.path=none.jsonl"], ["none.jsonl"]),
    "relative run_dir": (["run_dir=null"], ["runs/mine", "would be lost", "run_dir=/shared/runs/mine"]),
    "too large": (["pools.policy.cpus_per_worker=64"], ["the cluster is too small", "'policy' needs", "64 CPUs"]),
    "no GPUs": (["pools.policy.gpus_per_worker=1"], ["the cluster is too small", "1 GPU"]),
    "value on the command line": (["--env", "A=s3cret"], ["--env A: write the name alone"]),
    "secret as a setting": (["--env", "HF_TOKEN"], ["--secret HF_TOKEN"]),
    "value of a secret": (["--secret", "HF_TOKEN=s3cret"], ["--secret HF_TOKEN: write the name alone"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_run_is_refused_and_nothing_is_sent(fake: FakeHead, case: str) -> None:
    words, says = BAD[case]
    result = submit(fake, *words)
    refused(result, *says)
    assert "s3cret" not in result.output
    assert sent(fake) == []


def test_what_stays_behind_is_told_before_anything_is_sent(fake: FakeHead, project: Path) -> None:
    (project / ".gitignore").write_text("*.jsonl\n")
    refused(submit(fake), "dataset.path: rows.jsonl is here and would not be sent", ".gitignore")
    (project.parent / "far.yaml").write_text((project / "mine.yaml").read_text())
    refused(give("submit", "../far.yaml", "--address", fake.address), "lies outside of")
    assert sent(fake) == []


def test_what_only_the_cluster_has_is_left_to_it(fake: FakeHead) -> None:
    result = submit(fake, "dataset.path=/shared/far/rows.jsonl", "--no-wait")
    assert result.exit_code == 0, result.output
    assert "not on this machine" in result.output
    assert "dataset.path: /shared/far/rows.jsonl" in result.output


def test_a_head_that_cannot_be_used_is_told(fake: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_ANSWER_S", 0.5)
    monkeypatch.setattr(head_module, "_AGENT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        refused(
            give("submit", "mine.yaml", "--address", f"http://127.0.0.1:{deaf.getsockname()[1]}"), "no answer in 0.5 s"
        )
    refused(give("status", "--address", "http://127.0.0.1:9"), "nobody answers", "8265")
    refused(give("status", "--address", "http://no-such-host.invalid:8265"), "nobody answers")
    refused(give("stop", "mine", "--address", "ray://head:10001"), "Ray's own client")
    refused(give("logs", "My Run", "--address", fake.address), "no name of a run")
    refused(give("logs", "other", "--address", fake.address), "other: this cluster has no such run; it has none")
    refused(give("status"), "which cluster")
    fake.nodes = [NODE | {"state": "DEAD"}]
    refused(submit(fake), "the cluster has no node")
    fake.nodes = [NODE]
    fake.refusal = "Traceback\nValueError: no room"
    refused(submit(fake), "the job was refused", "no room")
    fake.ray_version = "2.9.1"
    refused(submit(fake), "the cluster runs Ray 2.9.1", "install the same")
    assert fake.jobs == {}


def test_stop_waits_for_the_end_also_of_a_job_that_has_not_begun(fake: FakeHead) -> None:
    fake.job("mine", "PENDING", runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}})
    fake.logs["mine"] = "stopped after 2 of 3 steps; the same command goes on\n\n"
    result = give("stop", "mine", "--address", fake.address)
    assert result.exit_code == 0, result.output
    assert "longer than 90 s" in result.output
    assert result.output.endswith("mine: stopped\nstopped after 2 of 3 steps; the same command goes on\n")
    again = give("stop", "mine", "--address", fake.address)
    assert "over already: stopped, exit code 75" in again.output


def test_a_job_that_does_not_stop_is_told(fake: FakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "_MARGIN_S", 0.0)
    fake.job("mine", "RUNNING", runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "0.3"}})
    monkeypatch.setattr(head_module.Head, "stop", lambda self, job: True)
    result = give("stop", "mine", "--address", fake.address)
    assert result.exit_code == 1, result.output
    assert "still running after 0.3 s" in result.output


def test_the_status_shows_each_run_once_and_of_one_every_attempt(fake: FakeHead, tmp_path: Path) -> None:
    ours, far = ({"metadata": {"paceline_run_dir": f"{tmp_path}/{name}"}} for name in ("b", "not-here"))
    fake.job("a", "FAILED", start_time=1_000, end_time=66_000, driver_exit_code=1, **far)
    fake.job("a.2", "RUNNING", start_time=70_000, **far)
    fake.job("b", "STOPPED", start_time=80_000, end_time=81_000, **ours)
    fake.job("somebody-elses", "RUNNING", start_time=90_000)
    fake.job("raysubmit_X", "RUNNING")
    fake.logs["a.2"] = "a  1/9  loss 2.5\na  2/9  loss 2.25  tokens 3  time 4\nsomething else\n"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "b/metrics.jsonl").write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.125}\n{"step": 2, "lo')
    rows = [
        line.split("│")[1:-1] for line in give("status", "--address", fake.address).output.splitlines() if "│" in line
    ]
    told = [[cell.strip() for cell in row] for row in rows]
    assert [(row[0], row[1], row[2], row[5], row[6]) for row in told] == [
        ("a", "2", "running", "2/9  loss 2.25  tokens 3", ""),
        ("b", "1", "stopped", "2/3  loss 2.12", "75"),
    ]
    one = give("status", "a", "--address", fake.address).output
    assert "1 min 5 s" in one
    assert one.count("failed") == 1


def test_ctrl_c_leaves_the_run_running_and_says_how_to_go_on(fake: FakeHead, project: Path) -> None:
    fake.logs["mine"] = "mine  1/3  loss 2.0\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", "submit", "mine.yaml", "--address", fake.address],
        cwd=project, env=env | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while "1/3" not in (line := process.stdout.readline()):
            assert line, process.communicate()
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - began < 15.0
    assert process.returncode == 130, errors
    assert "detached: the run goes on" in errors
    assert f"python -m deploy logs mine --address {fake.address}" in errors
    assert "Traceback" not in errors
    assert fake.jobs["mine"]["status"] == "RUNNING"
    assert not any("stop" in request for request in fake.requests)
