"""Every recipe under recipes/methods/ is planned from the root of the repository, and trains.

The policy and the reference are real, DeepSpeed and all; the engines are light (tests/chaos), so that a run takes
seconds and its tokens come at once, from any weights.
"""

import io
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import deploy.train
from actors.model.tiny import make_tiny_model
from actors.recipe.file import load_recipe
from actors.recipe.model import TinyModel
from actors.recipe.schema import GrpoRecipe
from actors.run.folder import RunFolder
from actors.run.grpo import run_grpo
from actors.workers import Roles
from tests.prove import ONLY_PROVE

ROOT = Path(__file__).parents[2]
METHODS = sorted(path.stem for path in (ROOT / "recipes/methods").glob("*.yaml"))
QUICK = {"dapo", "decoupled_ppo", "reinforce_plus_plus", "rloo"}
"""Between them they reach every way from a recipe to the loss; the others are of `make prove`."""
SMALL = '{"cpus_per_worker": 0.1}'
LIGHT = [
    "steps=2",
    "groups_per_batch=3",
    "algorithm.num_generations=4",
    "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1}",
    f"rewards.functions.0.function={ROOT}/tests/chaos/reward.py:score",
    *(f"pools.{pool}={SMALL}" for pool in ("policy", "reference", "reward", "rollout")),
]


def method(name: str, *overrides: str) -> GrpoRecipe:
    recipe = load_recipe(str(ROOT / f"recipes/methods/{name}.yaml"), overrides)
    assert isinstance(recipe, GrpoRecipe)
    return recipe


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, out, err = command_line("plan", f"recipes/methods/{name}.yaml", "--nodes", "1")
    assert (code, err) == (0, "")
    assert f"recipes/methods/{name}.yaml: grpo, 60 steps" in out
    assert ("reference │" in out) == (method(name).algorithm.beta > 0)


def command_line(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "deploy", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.cluster
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [ONLY_PROVE]) for name in METHODS])
def test_every_method_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps from the recipe as it ships, but for the sizes; the weights move, and no measure is missing."""
    import ray

    from tests.chaos.replica import LightRollout

    engines: Any = ray.remote(LightRollout)
    monkeypatch.setattr(deploy.train, "run_grpo", partial(run_grpo, roles=Roles(rollout=engines)))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(23)))
    data = f"dataset={{path: {tmp_path}/rows.jsonl}}"
    teacher = ["reference={kind: pretrained, path: " + str(tmp_path / "teacher") + "}"]
    if method(name).reference is not None:
        make_tiny_model(TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=1), tmp_path / "teacher", seed=1)
    else:
        teacher = []
    recipe = method(name, *LIGHT, data, f"run_dir={tmp_path}/run", *teacher)
    jobs = deploy.train.prepare(recipe, name, None, False)
    deploy.train.execute(jobs, None, Console(file=io.StringIO()))
    folder = RunFolder(recipe.folder)
    metrics = folder.read_metrics()
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert math.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert line["policy/updates"] == recipe.algorithm.num_iterations
        assert 0 < line["sampling/ess"] <= 1
        assert ("kl" in line) == (recipe.algorithm.beta > 0)
    assert folder.finished
