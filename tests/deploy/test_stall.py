"""A run whose reward function hangs ends with its name and line, and leaves a checkpoint to go on from."""

import re
from pathlib import Path

import pytest

from actors.checkpoint.store import CheckpointStore
from tests.deploy.test_train import deploy
from tests.prove import ONLY_PROVE

RECIPE = """
kind: grpo
name: stalls
steps: 2
groups_per_batch: 2
run_dir: {folder}/run
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:patient"}}], timeout_s: 600}}
algorithm: {{num_generations: 2}}
generation: {{max_prompt_length: 16, max_completion_length: 8}}
rollout: {{num_threads: 1}}
stall: {{timeout_s: 30}}
pools:
  policy: {{cpus_per_worker: 0.5}}
  rollout: {{cpus_per_worker: 0.5}}
  reward: {{cpus_per_worker: 0.25}}
"""

HANGS = """
import time

def patient(completions, **kwargs):
    while True:
        time.sleep(1.0)
"""


@ONLY_PROVE
@pytest.mark.cluster
def test_a_run_that_stalls_names_the_line_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "reward.py").write_text(HANGS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    result = deploy("train", str(tmp_path / "recipe.yaml"))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    told = result.stderr.strip().splitlines()[-1]
    assert re.match(r"error: no group finished for \d+ s while the policy waits: reward worker 0 \(pid ", told)
    assert f"is in patient, {tmp_path}/reward.py:6; the same command goes on from step 0" in told
    seen = (tmp_path / "run" / "stall.txt").read_text()
    for part in ("== policy rank 0", "== rollout replica 0", "== reward worker 0", "EngineCore", "patient ("):
        assert part in seen
    assert CheckpointStore(tmp_path / "run" / "checkpoints").versions() == [0]
