"""Every recipe of a real size fits on the hardware that its comment names, GPUs and host alike."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.data.dataset import load_rows, reward_column_names
from actors.recipe.file import load_recipe
from actors.recipe.model import PretrainedModel
from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe
from actors.rewards.functions import check_reward
from deploy.host_memory import host_lines
from deploy.memory import estimate
from placement.cluster import uniform
from placement.plan import plan

ROOT = Path(__file__).parents[2]
HARDWARE = re.compile(r"^# Hardware: (\d+) nodes? of (\d+) GPUs with (\d+) GB, (\d+) GB of host memory$", re.M)
RECIPES = sorted(path for path in ROOT.glob("recipes/*.yaml") if "# Hardware" in path.read_text())
KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
CONFIGS: dict[str, tuple[str, tuple[int, ...], int, bool]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", (28, 1536, 8960, 12, 2), 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", (28, 3584, 18944, 28, 4), 152064, False),
    "Qwen/Qwen2.5-32B-Instruct": ("qwen2", (64, 5120, 27648, 40, 8), 152064, False),
    "meta-llama/Llama-3.3-70B-Instruct": ("llama", (80, 8192, 28672, 64, 8), 128256, False),
}
CPUS_PER_NODE = 32.0


@dataclass(frozen=True)
class Sized:
    recipe: GrpoRecipe
    num_nodes: int
    gpus: int
    gpu_gb: float
    host_gb: float


def sized(path: Path, folder: Path) -> Sized:
    """The recipe with its model's config.json in a folder here, and its hardware."""
    found = HARDWARE.search(path.read_text())
    assert found is not None, f"{path.name}: write '# Hardware: N nodes of 8 GPUs with 80 GB, 512 GB of host memory'"
    named = load_recipe(path).model
    assert isinstance(named, PretrainedModel)
    kind, sizes, vocabulary, tied = CONFIGS[named.path]
    config: dict[str, Any] = dict(zip(KEYS, sizes, strict=True))
    config |= {"model_type": kind, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = load_recipe(path, (f"model.path={folder}",))
    assert isinstance(recipe, GrpoRecipe)
    nodes, gpus, gpu_gb, host_gb = map(int, found.groups())
    return Sized(recipe, nodes, gpus, gpu_gb, host_gb)


def test_there_is_one_of_every_size() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {
        "qwen2.5_1.5b",
        "qwen2.5_1.5b_colocated",
        "qwen2.5_7b",
        "qwen2.5_7b_lora",
        "qwen2.5_32b",
        "llama3.3_70b_lora",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_fits_on_the_gpus_that_it_names_and_leaves_none_idle(path: Path, tmp_path: Path) -> None:
    case = sized(path, tmp_path)
    cluster = uniform(case.num_nodes, CPUS_PER_NODE, case.gpus)
    placed = plan(used_pools(case.recipe), cluster)
    found = estimate(case.recipe, placed, cluster, case.gpu_gb)
    assert found.table is not None
    assert "beyond them" not in " ".join(found.lines)  # a replica's cache holds all that it decodes
    used = sum(bundle.own_gpus for bundles in placed.bundles.values() for bundle in bundles)
    assert used == case.num_nodes * case.gpus


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_nodes_hold_what_waits_in_their_memory(path: Path, tmp_path: Path) -> None:
    case = sized(path, tmp_path)
    placed = plan(used_pools(case.recipe), uniform(case.num_nodes, CPUS_PER_NODE, case.gpus))
    (line,) = host_lines(case.recipe, placed)
    needed = re.match(r"host memory: (\d+) GB on node-\d", line)
    assert needed is not None
    assert float(needed[1]) < 0.7 * case.host_gb


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_data_and_its_reward_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path, ("dataset.size=3",))
    assert isinstance(recipe, GrpoRecipe)
    rows = load_rows(recipe.dataset)
    for reward in recipe.rewards.functions:
        check_reward(reward.function, reward_column_names(rows.column_names))
