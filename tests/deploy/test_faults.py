"""Workers of every role die in a real run, and nothing is lost."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from actors.journal import fates, read
from tests.deploy.test_train import lines

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
liveness: {{every_s: 1}}
checkpoint: {{every: 3}}
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


def workers(train: psutil.Process, role: str) -> list[psutil.Process]:
    """The actors of a class among the processes of a run."""
    found = []
    for process in train.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if role in name:
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
def test_every_role_may_die_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL to the only replica in mid-generation, to the reward worker, and to the policy's only rank.

    The policy waits for the new engine; a score that was lost is asked for again; the policy goes on from the last cut,
    and the second engine sees its second policy.
    """
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
        (victim,) = workers(train, "RolloutActor")
        children = victim.children(recursive=True)
        for child in children:
            if "EngineCore" in " ".join(child.cmdline()):
                child.suspend()  # so it cannot notice that its parent is gone
        victim.kill()
        wait_for_steps(tmp_path / "run", 5, train)
        (reward,) = workers(train, "RewardActor")
        reward.kill()
        wait_for_steps(tmp_path / "run", 8, train)
        (rank,) = workers(train, "PolicyActor")
        rank.kill()
        assert train.wait(timeout=250) == 0, (tmp_path / "log").read_text()
    finally:
        if train.is_running():
            train.kill()
        log.close()
    text = (tmp_path / "log").read_text()
    assert "warning: rollout replica 0 is fenced and will be rebuilt: " in text
    assert re.search(r"the policy is built again and goes on from step (3|6|9)\n", text)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["groups_lost"] == summary["groups_duplicated"] == summary["groups_quarantined"] == 0
    assert summary["max_staleness_seen"] <= 1
    assert (summary["replicas_rebuilt"], summary["scorers_restarted"], summary["policy_restarts"]) == (1, 1, 1)
    assert summary["rollouts_unscorable"] == 0
    told = fates(read(tmp_path / "run" / "ledger.jsonl"))
    assert not [*told.problems(), *told.lost()]
    assert sum(told.trained.values()) == 24
    assert set(told.waste) <= {"failed", "rolled back"}
    replicas = {line["replica"] for line in lines(tmp_path / "run" / "ledger.jsonl") if line["event"] == "dispatched"}
    assert replicas == {0, 1}, "the engine outlives the policy that it served"
    assert not [child for child in children if child.is_running()], "an engine outlived its actor"
