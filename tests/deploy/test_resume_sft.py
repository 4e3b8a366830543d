"""A supervised run that was killed, was stopped and lost its policy ends, to the bit, as one that was not."""

import contextlib
import json
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.checkpoint.store import CheckpointStore
from tests.deploy.test_faults import wait_for_steps, workers
from tests.deploy.test_resume import environment, train
from tests.prove import ONLY_PROVE

NUM_STEPS, EVERY = 260, 20
RECIPE = """
kind: sft
name: resumed
steps: {steps}
batch_size: 8
max_length: 96
run_dir: {folder}/run
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1, tie_word_embeddings: true}}
dataset: {{path: "reasoning_gym:spell_backward", size: 100, task: {{min_word_len: 3, max_word_len: 4}}}}
optimizer: {{learning_rate: 1.0e-3, lr_scheduler_type: cosine, warmup_steps: 10}}
policy: {policy}
checkpoint: {{every: {every}, best: {{metric: loss, mode: min}}}}
pools: {{policy: {{cpus_per_worker: 0.5}}}}
"""

ADAPTERS = "{lora: {r: 4, lora_alpha: 8, lora_dropout: 0.1}, num_threads: 1}"
"""With dropout, so that torch's random state matters."""


def begin(folder: Path) -> psutil.Popen:
    return psutil.Popen(train(folder), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.cluster
@pytest.mark.parametrize(
    "policy",
    [pytest.param(ADAPTERS, id="adapters"), pytest.param("{num_threads: 1}", marks=ONLY_PROVE, id="whole model")],
)
def test_a_killed_supervised_run_ends_as_one_that_was_not(tmp_path: Path, policy: str) -> None:
    """With a learning rate that depends on the step; the last of its processes loses its only rank."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, steps=NUM_STEPS, every=EVERY, policy=policy))
    run = broken / "run"

    unbroken, killed = begin(whole), begin(broken)  # beside each other: neither looks at a clock
    try:
        wait_for_steps(run, 3 * EVERY, killed)
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=30)
        store = CheckpointStore(run / "checkpoints")
        first = store.versions()[-1]
        check_is_a_model(store.open(first) / "model")
        said, _ = unbroken.communicate(timeout=200)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            unbroken.kill()
    assert unbroken.returncode == 0, said

    stopped = begin(broken)
    wait_for_steps(run, len(lines(run)) + EVERY, stopped)  # more than there were before it went back
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, said
    assert f"going on from step {first} of {NUM_STEPS}" in said
    at = store.versions()[-1]
    assert f"stopped after {at} of {NUM_STEPS} steps; the same command goes on" in said
    assert first < at == len(lines(run)) < NUM_STEPS

    survivor = begin(broken)
    wait_for_steps(run, at + EVERY, survivor)
    (rank,) = workers(survivor, "PolicyActor")
    rank.kill()
    said, _ = survivor.communicate(timeout=200)
    assert survivor.returncode == 0, said
    assert re.search(r"warning: .*; the policy is built again and goes on from step \d+\n", said)
    for name in ("model.safetensors", *(["adapter/adapter_model.safetensors"] if policy == ADAPTERS else [])):
        assert (run / "model" / name).read_bytes() == (whole / "run" / "model" / name).read_bytes(), name
    for mine, other in zip(lines(run), lines(whole / "run"), strict=True):
        for metric in ("step", "loss", "grad_norm", "learning_rate", "num_tokens"):
            assert mine[metric] == other[metric], metric
    mine, other = (json.loads((folder / "run" / "summary.json").read_text()) for folder in (broken, whole))
    for figure in ("loss_first", "loss_last", "tokens_trained", "weight_version"):
        assert mine[figure] == other[figure], figure
    assert (mine["resumed"], other["resumed"]) == (3, 0)
    assert (mine["policy_restarts"], other["policy_restarts"]) == (1, 0)
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best["version"] in store.versions()


@ONLY_PROVE
@pytest.mark.cluster
def test_a_rank_that_hangs_is_named_and_replaced(tmp_path: Path) -> None:
    """It gives no sign of life for a minute."""
    recipe = RECIPE.format(folder=tmp_path, steps=NUM_STEPS, every=EVERY, policy="{num_threads: 1}")
    (tmp_path / "recipe.yaml").write_text(recipe)
    train = begin(tmp_path)
    wait_for_steps(tmp_path / "run", EVERY, train)
    (rank,) = workers(train, "PolicyActor")
    rank.suspend()
    said, _ = train.communicate(timeout=280)
    assert train.returncode == 0, said
    assert re.search(rf"policy rank 0 \(pid {rank.pid}, node [\d.]+\) is stopped \(state T", said)
    assert f"pid {rank.pid}, state T" in (tmp_path / "run" / "stall.txt").read_text()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policy_restarts"] == 1


def check_is_a_model(folder: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(folder).dtype.is_floating_point
    assert AutoTokenizer.from_pretrained(folder).decode([104, 105]) == "hi"
