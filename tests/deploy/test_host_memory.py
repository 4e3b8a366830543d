"""Nodes and pods are told what waits in their own memory, by hand calculation."""

import json
from pathlib import Path

import pytest

from actors.recipe.file import load_recipe
from actors.recipe.pools import used_pools
from deploy.host_memory import host_lines
from deploy.manifest.options import ManifestOptions
from deploy.manifest.render import render
from placement.cluster import uniform
from placement.plan import plan

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/qwen2.5_7b.yaml"
P = 7_615_616_512
CONFIG = {
    **{"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The override that names a model whose shape is known here; the working directory is the project's."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return f"model.path={tmp_path}"


def lines(*overrides: str, num_nodes: int = 2) -> list[str]:
    recipe = load_recipe(RECIPE, overrides)
    return host_lines(recipe, plan(used_pools(recipe), uniform(num_nodes, 32.0, 8)))


def told(gigabytes: float) -> str:
    return f"host memory: {gigabytes:.0f} GB on node-"


def test_ranks_load_the_model_whole(model: str) -> None:
    assert lines(model)[0].startswith(told(8 * 2 * P / 2**30))
    assert lines(model, "policy.dtype=float32")[0].startswith(told(8 * 4 * P / 2**30))


def test_a_checkpoint_lies_on_the_node_of_rank_0(model: str) -> None:
    few = ("pools.policy.num_workers=4", "sync.staging=none")
    assert lines(model, *few)[0].startswith(told(12 * P / 2**30))
    assert lines(model, *few, "policy.lora={r: 8}")[0].startswith(told(4 * 2 * P / 2**30))


def test_replicas_stage_a_version_for_each_gpu(model: str) -> None:
    few = ("pools.policy.num_workers=4", "pools.rollout.num_workers=4", "pools.rollout.gpus_per_worker=4")
    assert lines(model, *few, num_nodes=3)[0].startswith(told(8 * 2 * P / 2**30))
    one_node = ("pools.policy.num_workers=4", "pools.rollout.num_workers=4")
    assert lines(model, *one_node, num_nodes=1)[0].startswith(told((12 + 4 * 2) * P / 2**30))


def test_weights_below_an_adapter_wait_there_while_their_engine_sleeps(model: str) -> None:
    shared = ("pools.rollout.colocate_with=policy", "sync.staging=none")
    assert lines(model, *shared, num_nodes=1)[0].startswith(told(8 * 2 * P / 2**30))
    assert lines(model, *shared, "policy.lora={r: 8}", num_nodes=1)[0].startswith(told(2 * 8 * 2 * P / 2**30))


def test_nothing_is_told_of_a_model_that_is_not_here() -> None:
    assert lines() == []


def test_a_pod_that_would_be_killed_is_refused_with_what_it_needs(model: str) -> None:
    # A pod sees no folder of this machine: what is checked is the size, so the path is below the mount.
    mount = str(Path(model.partition("=")[2]))
    overrides = (model, f"run_dir={mount}/run")
    recipe = load_recipe(RECIPE, overrides)

    def rendered(gigabytes: int) -> None:
        options = ManifestOptions(image="i", mount=mount, memory_per_gpu_gb=gigabytes)
        render(recipe, RECIPE, overrides, options, "2.60.0")

    rendered(64)
    with pytest.raises(ValueError, match=r"pool 'policy': 113 GB .* which has 64; say --memory-per-gpu-gb 19,"):
        rendered(8)
    rendered(19)
