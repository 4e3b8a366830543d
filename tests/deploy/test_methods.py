"""Each method of learning from data has a recipe that is planned, and that trains: the loss falls where it must."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from deploy.__main__ import app
from tests.prove import ONLY_PROVE

METHODS = sorted(path.stem for path in Path("recipes/methods").glob("*.yaml"))
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
    planned = CliRunner().invoke(app, ["plan", f"recipes/methods/{method}.yaml", "--nodes", "1"])
    assert planned.exit_code == 0, planned.output
    assert "12 steps of 16" in planned.output
    assert f"leaves runs/{method.replace('_', '-')}" in planned.output


def train(folder: Path, method: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy", "train", f"recipes/methods/{method}.yaml", f"run_dir={folder}/run"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=280)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.cluster
@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in IN_EVERY_RUN else ONLY_PROVE) for method in METHODS]
)
def test_it_trains(tmp_path: Path, method: str) -> None:
    done = train(tmp_path, method, "policy.num_threads=1", "pools.policy.cpus_per_worker=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
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
