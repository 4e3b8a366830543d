"""A run whose driver is killed goes on by the same command, and trains every group exactly once."""

import json
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
from actors.journal import fates, read
from tests.deploy.test_faults import RECIPE, REWARD, wait_for_steps
from tests.prove import ONLY_PROVE

NUM_STEPS = 12


def train(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "deploy", "train", str(folder / "recipe.yaml"), *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def wait_until(condition: Callable[[], bool], process: psutil.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "the run did not come that far"
        assert process.poll() is None, "the run has ended"
        time.sleep(0.2)


def is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return False


def journal_says(run: Path, event: str) -> bool:
    return f'"event": "{event}"' in (run / "ledger.jsonl").read_text()


def stop_in_order(folder: Path, run: Path, first: int) -> None:
    stopped = psutil.Popen(
        train(folder), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: journal_says(run, "resumed"), stopped)
    wait_for_steps(run, first + 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, said
    assert f"going on from step {first} of {NUM_STEPS}" in said
    assert f"of {NUM_STEPS} steps; the same command goes on" in said


@ONLY_PROVE
@pytest.mark.cluster
def test_a_killed_run_goes_on_by_the_same_command(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    run = tmp_path / "run"
    log = (tmp_path / "log").open("w")
    process = psutil.Popen(train(tmp_path), env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_steps(run, 5, process)
        # Ray's agents take their time to end.
        others = [child for child in process.children(recursive=True) if not is_agent(child)]
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        if process.is_running():
            process.kill()
        log.close()
    _, alive = psutil.wait_procs(others, timeout=40)
    assert not alive, "nothing of ours outlives the driver"
    first = CheckpointStore(run / "checkpoints").versions()[-1]
    assert first % 3 == 0

    refused = subprocess.run(
        [*train(tmp_path), "algorithm.beta=0.1"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert "algorithm.beta was 0.0 when the run began and is 0.1 now" in refused.stderr

    stop_in_order(tmp_path, run, first)

    again = subprocess.run(train(tmp_path), env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    found = fates(read(run / "ledger.jsonl"))
    assert list(found.problems()) == []
    assert found.lost() == set()
    assert found.num_cuts == 2
    assert found.trained.total() == 2 * NUM_STEPS
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(NUM_STEPS)), "every step is reported once"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["groups_lost"], summary["groups_duplicated"], summary["resumed"]) == (0, 0, 2)
    assert summary["weight_version"] == NUM_STEPS

    shown = subprocess.run(
        [sys.executable, "-m", "deploy", "ledger", str(run)], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "each ordinal was trained once" in shown.stdout
