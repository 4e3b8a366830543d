"""What a recipe names either goes along, is on the cluster, or is refused by its key."""

from pathlib import Path

import pytest

from actors.recipe.file import load_recipe
from deploy.jobs.inputs import all_runs, check_room, check_run_dirs, check_sent, elsewhere, recipe_name
from deploy.jobs.shipment import pack
from placement.cluster import uniform

FIRST = """
kind: sft
name: first
steps: 1
batch_size: 2
model: {kind: tiny}
dataset: {path: data/rows.jsonl}
run_dir: /shared/first
"""
SECOND = """
kind: grpo
name: second
steps: 1
groups_per_batch: 2
model: {kind: recipe, recipe: first.yaml}
reference: {kind: pretrained, path: /shared/no-such-model}
dataset: {path: reasoning_gym:spell_backward, size: 9}
rewards:
  functions: [{function: "rewards/mine.py:exact"}, {function: "package.module:f"}, {model: models/judge}]
algorithm: {num_generations: 2, beta: 0.1}
run_dir: /shared/second
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "first.yaml": FIRST,
        "second.yaml": SECOND,
        "rewards/mine.py": "",
        "data/rows.jsonl": "",
        "models/judge/x": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_that_lies_here_goes_along(project: Path) -> None:
    runs = all_runs(load_recipe("second.yaml"), "second.yaml")
    assert [path for path, _ in runs] == ["first.yaml", "second.yaml"]
    check_run_dirs(runs)
    check_sent(runs, pack(project))
    assert elsewhere(runs) == ["reference.path: /shared/no-such-model"]


@pytest.mark.parametrize(
    ("ignored", "key"),
    [
        ("second.yaml", "second.yaml: the recipe: second.yaml"),
        ("first.yaml", "first.yaml: the recipe: first.yaml"),
        ("data/", "first.yaml: dataset.path: data/rows.jsonl"),
        ("mine.py", "second.yaml: rewards.functions.0.function: rewards/mine.py"),
        ("models", "second.yaml: rewards.functions.2.model: models/judge"),
    ],
)
def test_what_would_stay_behind_is_named(project: Path, ignored: str, key: str) -> None:
    (project / ".rayignore").write_text(ignored)
    with pytest.raises(ValueError, match="would not be sent") as refused:
        check_sent(all_runs(load_recipe("second.yaml"), "second.yaml"), pack(project))
    assert str(refused.value).startswith(key)


def test_a_run_that_comes_first_needs_a_folder_that_stays_as_well(project: Path) -> None:
    (project / "first.yaml").write_text(FIRST.replace("run_dir: /shared/first", ""))
    with pytest.raises(ValueError, match=r"first.yaml: run_dir: runs/first .* in that file, such as run_dir=/shared"):
        check_run_dirs(all_runs(load_recipe("second.yaml"), "second.yaml"))


def test_a_run_that_comes_first_needs_room_as_well(project: Path) -> None:
    (project / "first.yaml").write_text(f"{FIRST}pools: {{policy: {{num_workers: 2, cpus_per_worker: 30}}}}\n")
    runs = all_runs(load_recipe("second.yaml"), "second.yaml")
    check_room(runs, uniform(2, 32.0, 0))
    with pytest.raises(ValueError, match=r"first.yaml: the cluster is too small: pool 'policy' needs 2 workers"):
        check_room(runs, uniform(1, 32.0, 0))


@pytest.mark.parametrize("given", ["deep/my.yaml", "./deep/my.yaml", "deep/../deep/my.yaml"])
def test_the_cluster_knows_a_recipe_by_its_path_in_the_folder(project: Path, given: str) -> None:
    assert recipe_name(given, project) == "deep/my.yaml"
    assert recipe_name(str(project / given), project) == "deep/my.yaml"
    with pytest.raises(ValueError, match="lies outside of"):
        recipe_name("../my.yaml", project)
