"""Every recipe under recipes/methods/ trains on real vLLM, by the command line and as it ships but for sizes, model
and rewards.

What light engines (test_methods.py) cannot show is shown here: the policy and the engine agree on what was sampled, so
that at the first step, which is on policy, ratios are 1, nothing is clipped, masks reject nothing and a KL is 0.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.journal import fates, read
from actors.model.tiny import make_tiny_model
from actors.recipe.model import TinyModel
from actors.recipe.schema import GrpoRecipe
from actors.run.folder import RunFolder
from tests.deploy.test_methods import METHODS, OWN_LOSS, ROOT, method, overrides
from tests.prove import ONLY_PROVE

NUM_STEPS, GROUPS = 3, 3
AGREE = 1e-3
"""Between log-probabilities of vLLM and of the policy, both in float32."""


def order(name: str, folder: Path) -> list[str]:
    make_tiny_model(TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=1), folder / "teacher", seed=1)
    without_data = [said for said in overrides(name, folder) if not said.startswith("dataset=")]
    return [*without_data, "dataset.size=50", f"steps={NUM_STEPS}", f"groups_per_batch={GROUPS}"]


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_vllm(name: str, tmp_path: Path) -> None:
    said = order(name, tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "deploy", "train", f"recipes/methods/{name}.yaml", *said],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    recipe = method(name, *said)
    folder = RunFolder(recipe.folder)
    metrics = folder.read_metrics()
    check_run(recipe, folder, metrics)
    check_first_step(name, recipe, metrics[0])
    if recipe.algorithm.advantage == "gae":
        assert (folder.critic / "model.safetensors").exists()


def check_run(recipe: GrpoRecipe, folder: RunFolder, metrics: list[dict[str, float]]) -> None:
    """All steps, each with a gradient, each group with one fate, no token too old, and no measure missing or wild."""
    assert [line["step"] for line in metrics] == list(range(NUM_STEPS))
    assert [line["weights/version"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    for line in metrics:
        assert all(math.isfinite(value) for value in line.values()), line
        assert line["grad_norm"] > 0
        assert line["policy/updates"] == recipe.algorithm.num_iterations
        assert line["policy/skipped"] == 0
        assert line["staleness/max"] <= recipe.staleness.max_staleness
        assert ("kl" in line) == (recipe.algorithm.beta > 0)
        assert ("value/loss" in line) == (recipe.algorithm.advantage == "gae")
    told = fates(read(folder.ledger))
    assert not [*told.problems(), *told.lost()]
    assert sum(told.trained.values()) == GROUPS * NUM_STEPS
    assert told.by_step == dict.fromkeys(range(NUM_STEPS), GROUPS)
    summary = json.loads((folder.path / "summary.json").read_text())
    assert (summary["steps"], summary["weight_version"]) == (NUM_STEPS, NUM_STEPS)
    assert (summary["groups_lost"], summary["groups_duplicated"]) == (0, 0)
    assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"] == recipe.staleness.max_staleness
    assert (folder.model / "model.safetensors").exists()


def check_first_step(name: str, recipe: GrpoRecipe, first: dict[str, float]) -> None:
    """Of a policy that is its own reference, unless that is a teacher, and made what it learns from."""
    assert first["staleness/max"] == 0
    assert first["entropy"] > 0
    teacher = recipe.reference is not None
    if "kl" in first:
        assert first["kl"] > AGREE if teacher else abs(first["kl"]) < AGREE
    if name == "online_dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=AGREE)
        assert 1 <= first["pairs"] <= GROUPS
    if name == "gkd":
        assert 1e-4 < first["loss"] < math.log(2), "Jensen and Shannon's divergence from another model"
    if name in OWN_LOSS:
        assert "sampling/ess" not in first
        return
    assert first["sampling/sampling_logp_difference/max"] < AGREE, "vLLM and DeepSpeed agree on the policy"
    assert first["sampling/ess"] == pytest.approx(1.0, abs=AGREE)
    assert abs(first["sampling/kl"]) < AGREE
    if recipe.algorithm.num_iterations == 1:
        assert first["clip_ratio/region_mean"] == 0
    if name in ("icepop", "geometric_mask", "off_policy_mask"):
        assert first["sampling/rejected"] == 0
    if name == "dapo":
        assert first["frac_reward_zero_std"] == 0, "groups without spread are replaced"
    if name == "ppo":
        assert first["value/loss"] > 0
        assert first["value/explained_variance"] < 1
