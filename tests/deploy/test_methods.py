"""Every recipe under recipes/methods/ is planned from the root of the repository, and trains.

The policy and the reference are real, DeepSpeed and all; the engines are light (tests/chaos), so that a run takes
seconds and its tokens come at once, from any weights.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.model.tiny import make_tiny_model
from actors.recipe.file import load_recipe
from actors.recipe.model import TinyModel
from actors.recipe.schema import GrpoRecipe
from actors.run.folder import RunFolder
from deploy.__main__ import app
from deploy.session import shut_in
from tests.prove import PROVING

ROOT = Path(__file__).parents[2]
METHODS = sorted(path.stem for path in (ROOT / "recipes/methods").glob("*.yaml"))
QUICK = ["dapo", "decoupled_ppo", "reinforce_plus_plus", "rloo"]
"""Ratio and correction, several iterations, dynamic sampling, a KL in the rewards. The others are of `make prove`: a
critic, a teacher, GKD and online DPO are reached there alone."""
OWN_LOSS = ("gkd", "online_dpo")
"""They correct for no staleness, and measure none of what corrections do."""
TRAINED = METHODS if PROVING else QUICK
JUDGE = ROOT / "tests/deploy/judges.py:first"
SMALL = '{"cpus_per_worker": 0.1}'
LIGHT = [
    "steps=2",
    "groups_per_batch=3",
    "algorithm.num_generations=4",
    "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}",
    f"rewards.functions.0={{function: {ROOT}/tests/chaos/reward.py:score}}",
    *(f"pools.{pool}={SMALL}" for pool in ("policy", "reference", "reward", "rollout")),
]


def method(name: str, *overrides: str) -> GrpoRecipe:
    recipe = load_recipe(str(ROOT / f"recipes/methods/{name}.yaml"), overrides)
    assert isinstance(recipe, GrpoRecipe)
    return recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["plan", f"recipes/methods/{name}.yaml", "--nodes", "1"])
    assert (done.exit_code, done.stderr) == (0, ""), done.exception
    assert f"recipes/methods/{name}.yaml: grpo, 60 steps" in done.stdout
    assert ("reference │" in done.stdout) == (method(name).algorithm.beta > 0)
    assert ("critic" in done.stdout) == (method(name).algorithm.advantage == "gae")


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, GrpoRecipe]:
    """Two steps of each recipe that is asked for as it ships, but for the sizes and the data."""
    asked = {item.name for item in request.session.items}
    folder = tmp_path_factory.mktemp("methods")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"row {row}", "completion": "done"}) + "\n" for row in range(23))
    )
    make_tiny_model(TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=1), folder / "teacher", seed=1)
    orders = {
        name: [f"recipes/methods/{name}.yaml", *overrides(name, folder)]
        for name in TRAINED
        if f"test_every_method_trains[{name}]" in asked
    }
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    shut_in(env)
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.light_engines"],
        input=json.dumps(list(orders.values())),
        capture_output=True,
        text=True,
        timeout=60 + 60 * len(orders),
        check=False,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: method(name, *order[1:]) for name, order in orders.items()}


def overrides(name: str, folder: Path) -> list[str]:
    judged = method(name).rewards.functions[0].judge is not None
    light = [*LIGHT, "algorithm.num_generations=2", f"rewards.functions=[{{judge: {JUDGE}}}]"] if judged else LIGHT
    teacher = [f"reference={{kind: pretrained, path: {folder}/teacher}}"] if method(name).reference else []
    teacher += [f"pools.critic={SMALL}"] if method(name).pools.critic else []
    return [*light, f"dataset={{path: {folder}/rows.jsonl}}", f"run_dir={folder}/{name}", *teacher]


@pytest.mark.cluster
@pytest.mark.timeout(60 + 60 * len(METHODS))
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains(name: str, runs: dict[str, GrpoRecipe]) -> None:
    """There is a gradient, and no measure is missing."""
    recipe = runs[name]
    folder = RunFolder(recipe.folder)
    metrics = folder.read_metrics()
    assert [line["step"] for line in metrics] == [0, 1]
    for line in metrics:
        assert math.isfinite(line["loss"])
        # What light engines call a token's probability is made up, so that a mask may well reject all of them.
        assert line["grad_norm"] > 0 or line["sampling/rejected"] == 1.0
        assert line["policy/updates"] == recipe.algorithm.num_iterations
        if name not in OWN_LOSS:
            assert 0 < line["sampling/ess"] <= 1
        assert ("kl" in line) == (recipe.algorithm.beta > 0)
        assert ("value/loss" in line) == (recipe.algorithm.advantage == "gae")
    assert folder.finished
