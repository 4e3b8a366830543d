"""Each method of learning from data has a recipe that is planned, and that trains: the loss falls where it must."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from actors.data.dataset import load_rows
from actors.model.tiny import byte_tokenizer
from actors.recipe.base import OfflineRecipe
from actors.recipe.file import load_recipe
from deploy.__main__ import app
from deploy.columns import example_stream, needed_columns
from tests.deploy.test_faults import wait_for_steps
from tests.prove import ONLY_PROVE

METHODS = sorted(path.stem for path in Path("recipes/offline").glob("*.yaml"))
IN_EVERY_RUN = ("dpo", "reward")
GROWS = {
    "dpo": "rewards/margins",
    "ipo": "rewards/margins",
    "kto": "rewards/margins",
    "orpo": "log_odds_chosen",
    "cpo": "rewards/margins",
    "simpo": "rewards/margins",
    "reward": "margin",
}
"""What the loss is to make larger."""


def test_every_method_is_here() -> None:
    assert set(METHODS) == {*GROWS, "sft_chat"}


@pytest.mark.parametrize("method", METHODS)
def test_it_is_planned(method: str) -> None:
    planned = CliRunner().invoke(app, ["plan", f"recipes/offline/{method}.yaml", "--nodes", "1"])
    assert planned.exit_code == 0, planned.output
    assert "12 steps of 16" in planned.output
    assert f"leaves runs/{method.replace('_', '-')}" in planned.output


@pytest.mark.parametrize("method", METHODS)
def test_its_data_make_examples(method: str) -> None:
    recipe = load_recipe(f"recipes/offline/{method}.yaml")
    rows = load_rows(recipe.dataset, needed_columns(recipe))
    assert isinstance(recipe, OfflineRecipe)
    assert example_stream(recipe, rows, byte_tokenizer(256)).rows.source == recipe.dataset.path


ONE_THREAD = ("policy.num_threads=1", "pools.policy.cpus_per_worker=0.5")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def command(folder: Path, method: str, *overrides: str) -> list[str]:
    verb = [sys.executable, "-m", "deploy", "train", f"recipes/offline/{method}.yaml", f"run_dir={folder}/run"]
    return [*verb, *ONE_THREAD, *overrides]


def train(folder: Path, method: str, *overrides: str) -> None:
    done = subprocess.run(
        command(folder, method, *overrides), env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.cluster
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in IN_EVERY_RUN else ONLY_PROVE) for method in METHODS]
)
def test_it_trains(tmp_path: Path, method: str) -> None:
    train(tmp_path, method)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(12))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["grad_norm"] > 0 for line in lines)
    if method in GROWS:
        assert lines[-1][GROWS[method]] > lines[0][GROWS[method]]
    if method in ("dpo", "ipo", "kto"):  # before the first step the policy is its reference
        assert abs(lines[0]["rewards/chosen"]) < 1e-5
    model = tmp_path / "run/model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    auto = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    loaded, report = auto.from_pretrained(model, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    answers = tokenizer(["Spell abc backward: cba", "Spell abc backward: ab"], padding=True, return_tensors="pt")
    assert loaded(**answers).logits.isfinite().all()


@pytest.mark.cluster
@ONLY_PROVE
@pytest.mark.parametrize(
    ("method", "more"), [("kto", []), ("dpo", ["policy.lora={r: 4, lora_alpha: 8}"])], ids=["kto", "dpo, adapters"]
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, method: str, more: list[str]) -> None:
    """To the bit; its reference is that of the first start."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["steps=60", "checkpoint.every=5", *more]
    train(whole, method, *options)
    stopped = psutil.Popen(
        command(broken, method, *options), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_steps(broken / "run", 12, stopped)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, said
    assert 12 <= len(metrics(broken)) < 60
    train(broken, method, *options)
    weights = [(folder / "run/model/model.safetensors").read_bytes() for folder in (whole, broken)]
    assert weights[0] == weights[1]
    for mine, other in zip(metrics(broken), metrics(whole), strict=True):
        for metric in ("step", "loss", "grad_norm", "rewards/chosen", "logps/chosen"):
            assert mine[metric] == other[metric], metric


@pytest.mark.cluster
@ONLY_PROVE
@pytest.mark.parametrize("sharded", ["policy.zero_stage=3", "policy.dtype=bfloat16"])
def test_two_ranks_learn_what_one_does(tmp_path: Path, sharded: str) -> None:
    """Pairs and the reward model's new head, sharded; in bfloat16 about the same."""
    for method in IN_EVERY_RUN:
        one, two = tmp_path / f"one-{method}", tmp_path / f"two-{method}"
        train(one, method)
        train(two, method, "pools.policy.num_workers=2", "policy.max_tokens_per_micro_batch=150", sharded)
        tolerance = 1e-3 if "zero" in sharded else 0.05
        for mine, other in zip(metrics(two), metrics(one), strict=True):
            assert abs(mine["loss"] - other["loss"]) < tolerance, method
