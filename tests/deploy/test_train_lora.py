"""A supervised and a GRPO run of adapters by the command line, the second from what the first leaves."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.deploy.test_train import SFT, check_ledger, deploy, lines
from tests.prove import ONLY_PROVE

LORA = "\npolicy: {{lora: {{r: 4, lora_alpha: 8}}}}\n"
GRPO = """
kind: grpo
name: second
steps: 3
groups_per_batch: 3
run_dir: {folder}/second
model: {{kind: recipe, recipe: {folder}/first.yaml}}
dataset: {{path: "reasoning_gym:spell_backward", size: 100, task: {{min_word_len: 3, max_word_len: 4}}}}
rewards: {{functions: [{{function: "recipes/rewards/reasoning_gym_score.py:reasoning_gym_score"}}]}}
algorithm: {{num_generations: 4, beta: 0.0}}
staleness: {{max_staleness: {max_staleness}}}
generation: {{max_prompt_length: 80, max_completion_length: 6}}
rollout: {{num_threads: 1}}
pools:
  policy: {{cpus_per_worker: 0.25}}
  rollout: {{cpus_per_worker: 0.25}}
  reward: {{cpus_per_worker: 0.1}}
"""
NUM_BYTES = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 256)) * 4


@pytest.mark.cluster
@pytest.mark.parametrize("max_staleness", [0, pytest.param(1, marks=ONLY_PROVE)])
def test_adapters_are_trained_published_and_left(tmp_path: Path, max_staleness: int) -> None:
    """Without staleness every token is trained by the weights that sampled it."""
    for name, text in (("first", SFT), ("second", GRPO)):
        (tmp_path / f"{name}.yaml").write_text((text + LORA).format(folder=tmp_path, max_staleness=max_staleness))
    result = deploy("train", str(tmp_path / "second.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = lines(tmp_path / "second" / "metrics.jsonl")
    assert [row["weights/version"] for row in metrics] == [1, 2, 3]
    assert {row["sync/bytes"] for row in metrics} == {NUM_BYTES}
    assert all(row["grad_norm"] >= 0 for row in metrics)
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"] == max_staleness
    if max_staleness == 0:
        assert all(row["staleness/max"] == 0 for row in metrics)
        assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in metrics), "on-policy at every step"
        check_ledger(tmp_path / "second" / "ledger.jsonl", 9)
    check_models(tmp_path, NUM_BYTES)


def check_models(folder: Path, num_bytes: int) -> None:
    """What both runs have left: nothing but adapted layers has moved, and the adapters lie beside."""
    first, second = (load_file(folder / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    moved = {name for name in first if not first[name].equal(second[name])}
    assert moved <= {name for name in first if "_proj" in name}
    for name in ("first", "second"):
        adapter = folder / name / "model" / "adapter"
        assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
        assert sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values()) == num_bytes


@ONLY_PROVE
@pytest.mark.cluster
def test_so_are_adapters_over_four_bits(tmp_path: Path) -> None:
    """Replicas compute with whole weights, so that they differ from the policy by the quantization, and not by more;
    the reference of the KL penalty is the policy's own model of four bits."""
    lora = LORA.replace("lora_alpha: 8", "lora_alpha: 8, quantize: nf4").replace("lora:", "dtype: bfloat16, lora:")
    for name, text in (("first", SFT), ("second", GRPO.replace("beta: 0.0", "beta: 0.05"))):
        (tmp_path / f"{name}.yaml").write_text((text + lora).format(folder=tmp_path, max_staleness=0))
    result = deploy("train", str(tmp_path / "second.yaml"))
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = lines(tmp_path / "second" / "metrics.jsonl")
    assert [row["weights/version"] for row in metrics] == [1, 2, 3]
    assert all(1e-3 < row["sampling/sampling_logp_difference/max"] < 0.5 for row in metrics)
    assert metrics[0]["kl"] < 1e-3, "an adapter that is new adds nothing"
    check_ledger(tmp_path / "second" / "ledger.jsonl", 9)
    check_models(tmp_path, NUM_BYTES // 2)
