"""Engines die in a real run, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.deploy.test_train import check_ledger, lines

RECIPE = """
kind: grpo
name: faults
steps: 12
groups_per_batch: 2
run_dir: {folder}/run
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:digits"}}]}}
algorithm: {{num_generations: 2}}
generation: {{max_prompt_length: 16, max_completion_length: 100}}
rollout: {{num_threads: 1}}
sync: {{timeout_s: 20}}
pools:
  policy: {{cpus_per_worker: 0.5}}
  rollout: {{cpus_per_worker: 0.25}}
  reward: {{cpus_per_worker: 0.25}}
"""

REWARD = """
import time

def digits(completions, **kwargs):
    time.sleep(0.1)
    return [float(len(text) % 7) for text in completions]
"""


def engines(train: psutil.Process) -> list[psutil.Process]:
    """The rollout replicas' actors among the processes of a run."""
    found = []
    for process in train.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "RolloutActor" in name:
            found.append(process)
    return found


def wait_for_steps(run: Path, count: int, train: psutil.Popen) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and train.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.2)
    raise AssertionError(f"step {count} was not reached")


@pytest.mark.cluster
def test_a_killed_engine_is_rebuilt_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL to the only replica's actor, in mid-generation: the policy waits, the new engine gets the version."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    log = (tmp_path / "log").open("w")
    train = psutil.Popen(
        [sys.executable, "-m", "deploy", "train", str(tmp_path / "recipe.yaml")],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for_steps(tmp_path / "run", 2, train)
        (victim,) = engines(train)
        children = victim.children(recursive=True)
        for child in children:
            if "EngineCore" in " ".join(child.cmdline()):
                child.suspend()  # so it cannot notice that its parent is gone
        victim.send_signal(signal.SIGKILL)
        assert train.wait(timeout=250) == 0, (tmp_path / "log").read_text()
    finally:
        if train.is_running():
            train.kill()
        log.close()
    text = (tmp_path / "log").read_text()
    assert "warning: rollout replica 0 is fenced and will be rebuilt: it died while it sampled group" in text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["groups_lost"] == summary["groups_duplicated"] == summary["groups_quarantined"] == 0
    assert summary["max_staleness_seen"] <= 1
    check_ledger(tmp_path / "run" / "ledger.jsonl", 24)
    replicas = {line["replica"] for line in lines(tmp_path / "run" / "ledger.jsonl") if line["event"] == "dispatched"}
    assert replicas == {0, 1}
    assert not [child for child in children if child.is_running()], "an engine outlived its actor"
