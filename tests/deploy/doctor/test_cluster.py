"""Why Ray was not reached is told with the fix, and whether a recipe's workers have room where it was."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.doctor.check import Check, found_by
from deploy.doctor.cluster import check_gpu_memory, check_placement, reach, workers_of
from deploy.doctor.machine import Machine
from placement.cluster import uniform
from placement.plan import plan
from tests.deploy.doctor.recipes import recipe_of
from tests.deploy.doctor.test_machine import LARGE

GPUS = ("pools.policy.gpus_per_worker=1", "pools.rollout.gpus_per_worker=1")


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with contextlib.ExitStack() as session:
        found = found_by(Check("ray", 10.0, lambda: reach("127.0.0.1:9", session)))
    assert (found.level, found.text.startswith("--address 127.0.0.1:9: nobody answers there; start")) == ("fail", True)


def test_workers_that_have_no_place_are_told(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, *GPUS)
    cluster = uniform(1, 8.0, 1)
    found = found_by(Check("placement", 10.0, lambda: check_placement(recipe, cluster)))
    assert found.level == "fail"
    assert "1 GPU is missing" in found.text
    assert check_placement(recipe, uniform(1, 8.0, 2)).text == (
        "every worker has its place (policy 1 x 1 GPUs, reward 1 on CPUs, rollout 1 x 1 GPUs) on 1 node"
    )


def test_workers_and_engines_are_counted_by_node(tmp_path: Path) -> None:
    from actors.recipe.pools import used_pools

    recipe = recipe_of(tmp_path, *GPUS, "pools.rollout.num_workers=3")
    workers, engines = workers_of(plan(used_pools(recipe), uniform(2, 8.0, 2)))
    assert (sum(workers.values()), sum(engines.values())) == (5, 3)
    assert set(workers) == {"node-0", "node-1"}
    assert workers_of(None) == ({}, {})


QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("gpu_gb", "level", "said"),
    [
        (24.0, "fail", "pool 'policy' needs"),
        (240.0, "pass", "estimated for 7.62 B parameters"),
        (None, "skip", "how much memory its GPUs have is not known"),
    ],
)
def test_memory_is_held_against_the_gpus_that_are_there(
    tmp_path: Path, gpu_gb: float | None, level: str, said: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN_7B))
    model = f"model={{kind: pretrained, path: {tmp_path}/model}}"
    recipe = recipe_of(tmp_path, model, *GPUS, "policy.dtype=bfloat16", "rollout.dtype=bfloat16")
    machine: Machine = replace(LARGE, gpus_gb=() if gpu_gb is None else (gpu_gb, gpu_gb + 8))
    found = found_by(Check("memory", 10.0, lambda: check_gpu_memory(recipe, uniform(1, 8.0, 2), [machine])))
    assert (found.level, said in found.text) == (level, True), found


def test_memory_of_workers_without_gpus_is_not_estimated(tmp_path: Path) -> None:
    assert check_gpu_memory(recipe_of(tmp_path), uniform(1, 8.0, 2), [LARGE]).level == "skip"
