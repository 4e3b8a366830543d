"""A whole run whose replica lies with the policy, with real Ray, vLLM and DeepSpeed (on CPUs an engine at rest frees
nothing; it is put to sleep and woken up by the same calls)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.session import shut_in
from tests.deploy.test_train import DIGITS, check_ledger, lines
from tests.deploy.timed_workers import FOLDER, noted
from tests.prove import ONLY_PROVE

NUM_STEPS = 8

RECIPE = """
kind: grpo
name: colocated
steps: 8
groups_per_batch: 2
run_dir: {folder}/run
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1, max_position_embeddings: 512}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:digits"}}]}}
algorithm: {{num_generations: 2}}
optimizer: {{learning_rate: 1.0e-12}}
staleness: {{max_staleness: 1}}
generation: {{max_prompt_length: 16, max_completion_length: 400}}
rollout: {{num_threads: 1}}
logging: {{completions_every: 1, num_completions: 4}}
pools:
  policy: {{cpus_per_worker: 0.5}}
  rollout: {{cpus_per_worker: 0.5, colocate_with: policy}}
  reward: {{cpus_per_worker: 0.25}}
"""


@ONLY_PROVE
@pytest.mark.cluster
def test_no_token_is_sampled_while_the_policy_steps(tmp_path: Path) -> None:
    """Requests that run when a step begins go on after it: the weights stand still, so a cache that was not computed
    again as it was would show in the log-probabilities."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "reward.py").write_text(DIGITS)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "times").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shut_in(env)  # before Ray is imported there
    result = subprocess.run(
        [sys.executable, "-m", "tests.deploy.timed_workers", str(tmp_path / "recipe.yaml")],
        env=env | {"HF_HUB_OFFLINE": "1", FOLDER: str(tmp_path / "times")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passes, steps = noted(tmp_path / "times", "pass"), noted(tmp_path / "times", "step")
    assert len(steps) == NUM_STEPS
    for since, until in steps:
        assert not [one for one in passes if one[0] < until and one[1] > since]
    assert [one for one in passes if steps[0][1] < one[0] < steps[-1][0]], "and between them some are"
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["groups_trained"] == 2 * NUM_STEPS
    assert summary["groups_lost"] == summary["groups_duplicated"] == 0
    assert summary["max_staleness_seen"] == summary["max_staleness_allowed"] == 1
    check_ledger(run / "ledger.jsonl", 2 * NUM_STEPS)
    metrics = lines(run / "metrics.jsonl")
    assert all(row["sync/rest_s"] > 0 for row in metrics)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics)
    spans = [len(rollout["weight_versions"]) for path in (run / "completions").iterdir() for rollout in lines(path)]
    assert max(spans, default=0) > 1, "a request was meant to go on after a step"
