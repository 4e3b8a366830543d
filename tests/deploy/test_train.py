"""Whole runs by the command line: real Ray, vLLM and DeepSpeed, from the recipe to the summary."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.canaries import found_in_files, planted, watched
from tests.prove import ONLY_PROVE

SFT = """
kind: sft
name: first
steps: 3
batch_size: 8
max_length: 96
run_dir: {folder}/first
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1, tie_word_embeddings: true}}
dataset: {{path: "reasoning_gym:spell_backward", size: 100, task: {{min_word_len: 3, max_word_len: 4}}}}
pools: {{policy: {{cpus_per_worker: 0.5}}}}
"""

GRPO = """
kind: grpo
name: second
steps: 4
groups_per_batch: 3
run_dir: {folder}/second
model: {{kind: recipe, recipe: {folder}/first.yaml}}
dataset: {{path: "reasoning_gym:spell_backward", size: 100, task: {{min_word_len: 3, max_word_len: 4}}}}
rewards:
  functions:
    - {{function: "recipes/rewards/reasoning_gym_score.py:reasoning_gym_score"}}
    - {{function: "{folder}/reward.py:sometimes", weight: 0.5}}
  timeout_s: 5
algorithm: {{num_generations: 4, beta: 0.05, loss_type: grpo}}
staleness: {{max_staleness: 1}}
generation: {{max_prompt_length: 80, max_completion_length: 6}}
policy: {{zero_stage: 2}}
logging: {{completions_every: 2, num_completions: 2, wandb_project: test}}
pools:
  policy: {{cpus_per_worker: 0.25, num_workers: 2}}
  rollout: {{cpus_per_worker: 0.25, num_workers: 2}}
  reward: {{cpus_per_worker: 0.1, num_workers: 2}}
  reference: {{cpus_per_worker: 0.25}}
"""

REWARD = """
async def sometimes(completions, answer, **kwargs):
    if any(len(text) == 0 for text in answer):
        raise RuntimeError("never")
    return [None if len(text) % 2 else 1.0 for text in completions]
"""

TRL_METRICS = {
    "num_tokens", "step_time", "completions/mean_length", "completions/min_length", "completions/max_length",
    "completions/clipped_ratio", "rewards/reasoning_gym_score/mean", "rewards/reasoning_gym_score/std", "reward",
    "reward_std", "frac_reward_zero_std", "entropy", "kl", "clip_ratio/region_mean", "clip_ratio/low_mean",
    "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max", "loss", "grad_norm", "learning_rate",
    "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
}  # fmt: skip
OUR_METRICS = {
    "staleness/mean", "staleness/max", "weights/version", "sync/bytes", "sync/pause_s", "sync/total_s",
    "groups/trained", "groups/in_flight",
}  # fmt: skip


def deploy(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m deploy ...` as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "deploy", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"} | env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_ledger(path: Path, num_groups: int) -> None:
    """From the file alone: every dispatched ordinal was trained exactly once."""
    events = lines(path)
    fates = Counter(event["ordinal"] for event in events if event["event"] == "trained")
    assert set(fates) == {event["ordinal"] for event in events if event["event"] == "dispatched"}
    assert set(fates.values()) == {1}
    assert len(fates) == num_groups


@pytest.mark.cluster
def test_a_chain_of_recipes_with_every_kind_of_worker(tmp_path: Path) -> None:
    """SFT, then GRPO on two ranks and two replicas, with a reference and two rewards, one of them partly unscorable.

    The secrets in its environment are in nothing that it leaves or says, and in no argument of its processes, and none
    of these can be reached from another machine.
    """
    for name, text in (("first.yaml", SFT), ("second.yaml", GRPO), ("reward.py", REWARD)):
        (tmp_path / name).write_text(text.format(folder=tmp_path) if name.endswith("yaml") else text)
    secrets = planted()
    with tempfile.TemporaryDirectory(prefix="ray-") as session:  # a short path, for Ray's sockets
        with watched(secrets) as seen:
            result = deploy("train", str(tmp_path / "second.yaml"), RAY_TMPDIR=session, **secrets)
        assert result.returncode == 0, result.stdout + result.stderr
        assert found_in_files(secrets, tmp_path, Path(session)) == []
    assert len(seen.processes) > 10
    assert seen.told == set()
    # gloo listens for the policy's own ranks on the address that the host's name has.
    assert {name for name, _ in seen.listening if not name.startswith("ray::PolicyActor")} == set()
    assert not any(value in result.stdout + result.stderr for value in secrets.values())
    assert "second  4/4" in result.stdout
    run = tmp_path / "second"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == summary["weight_version"] == 4
    assert summary["groups_trained"] == 12
    assert summary["groups_lost"] == summary["groups_duplicated"] == 0
    assert summary["max_staleness_seen"] == summary["max_staleness_allowed"] == 1
    assert summary["tokens_trained"] == summary["tokens_generated"] > 12 * 4
    metrics = lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert set(metrics[-1]) >= TRL_METRICS | OUR_METRICS
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-5), "the policy starts as the reference"
    assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-3, "vLLM and DeepSpeed agree on the policy"
    assert [row["weights/version"] for row in metrics] == [1, 2, 3, 4]
    check_ledger(run / "ledger.jsonl", 12)
    samples = lines(run / "completions" / "step_00002.jsonl")
    assert len(samples) == 2
    assert set(samples[0]) >= {"prompt", "completion", "reward", "advantage", "weight_versions"}
    assert (run / "reward.png").exists()
    assert list((run / "wandb").glob("offline-run-*")), "W&B was asked for, offline"
    check_model_loads(run / "model")
    again = deploy("train", str(tmp_path / "second.yaml"))
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    assert (run / "summary.json").exists()


def check_model_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).eos_token is not None
    assert AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings


@ONLY_PROVE  # test_train_lora.py shows the same of adapters, test_publication.py of whole weights
@pytest.mark.cluster
def test_without_staleness_training_is_synchronous_and_on_policy(tmp_path: Path) -> None:
    """`max_staleness: 0`: every token is trained by the weights that sampled it, and no generation is interrupted."""
    (tmp_path / "first.yaml").write_text(SFT.format(folder=tmp_path))
    (tmp_path / "second.yaml").write_text(GRPO.format(folder=tmp_path))
    (tmp_path / "reward.py").write_text(REWARD)
    result = deploy(
        "train",
        str(tmp_path / "second.yaml"),
        "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}",
        "staleness.max_staleness=0",
        "staleness.in_flight_updates=false",
        "algorithm.beta=0",
        "pools.policy.num_workers=1",
        "pools.rollout.num_workers=1",
        "pools.reward.num_workers=1",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    run = tmp_path / "second"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["max_staleness_seen"] == summary["max_staleness_allowed"] == 0
    assert summary["groups_trained"] == 12
    metrics = lines(run / "metrics.jsonl")
    assert all(row["staleness/max"] == 0 for row in metrics)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics), "on-policy at every step"
    assert all("kl" not in row for row in metrics)
    check_ledger(run / "ledger.jsonl", 12)


STALE = """
kind: grpo
name: stale
steps: 10
groups_per_batch: 2
run_dir: {folder}/run
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1, max_position_embeddings: 512}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:digits"}}]}}
algorithm: {{num_generations: 2, dynamic_sampling: {{kind: zero_std}}}}
staleness: {{max_staleness: 1, over_sampling: 1.5, adapt_depth: {{}}}}
generation: {{max_prompt_length: 16, max_completion_length: 200}}
rollout: {{num_threads: 1}}
pools:
  policy: {{cpus_per_worker: 0.5}}
  rollout: {{cpus_per_worker: 0.5}}
  reward: {{cpus_per_worker: 0.25}}
"""

DIGITS = """
def digits(completions, **kwargs):
    return [float(len(text) % 7) for text in completions]
"""


@pytest.mark.cluster
@pytest.mark.parametrize("when_stale", [pytest.param(way, marks=ONLY_PROVE) for way in ("mask", "requeue")])
def test_long_tails_are_masked_or_requeued_and_the_bound_holds(when_stale: str, tmp_path: Path) -> None:
    """Lengths from 1 to 200 tokens: some groups outlive the bound, and the step does not wait for them."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "reward.py").write_text(DIGITS)
    (tmp_path / "recipe.yaml").write_text(STALE.format(folder=tmp_path))
    result = deploy("train", str(tmp_path / "recipe.yaml"), f"staleness.when_stale={when_stale}")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["groups_trained"] == 20
    assert summary["groups_lost"] == summary["groups_duplicated"] == 0
    assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"] == 1
    late = summary["waste"]["masked" if when_stale == "mask" else "requeued"]
    assert late["tokens"] > 0, "a straggler was meant to outlive the bound"
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(value for name, value in metrics[-1].items() if name.startswith("staleness/share/")) == pytest.approx(1)
    assert "bias/length_ks" in metrics[-1]
    if when_stale == "mask":
        assert max(row["staleness/masked"] for row in metrics) > 0
        assert summary["tokens_trained"] + late["tokens"] <= summary["tokens_generated"]
