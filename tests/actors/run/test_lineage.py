"""What a recipe starts from or learns from comes first, once, and never in a circle."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.recipe.file import load_recipe
from actors.run.lineage import trained_before

SFT: dict[str, Any] = {"kind": "sft", "steps": 1, "batch_size": 1, "dataset": {"path": "rows.jsonl"}}
GRPO: dict[str, Any] = {
    "kind": "grpo",
    "steps": 1,
    "groups_per_batch": 1,
    "dataset": {"path": "rows.jsonl"},
    "rewards": {"functions": [{"function": "rewards.py:score"}]},
    "algorithm": {"beta": 1.0},
}


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, kind: dict[str, Any], model: str | None = None, reference: str | None = None) -> str:
    recipe = kind | {"name": name, "model": {"kind": "recipe", "recipe": model} if model else {"kind": "tiny"}}
    if reference is not None:
        recipe |= {"reference": {"kind": "recipe", "recipe": reference}}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return f"{name}.yaml"


def before(path: str) -> list[str]:
    return [path for path, _ in trained_before(load_recipe(path), path)]


def test_the_teacher_comes_before_its_student_and_what_both_begin_with_once_and_first() -> None:
    base = write("base", SFT)
    teacher = write("teacher", GRPO, model=base)
    assert before(write("student", GRPO, model=base, reference=teacher)) == [base, teacher]
    assert before(write("other", GRPO, reference=teacher)) == [base, teacher]


def test_a_teacher_that_is_there_is_not_trained_again() -> None:
    base = write("base", SFT)
    teacher = write("teacher", GRPO, model=base)
    Path("runs/teacher").mkdir(parents=True)
    Path("runs/teacher/summary.json").write_text("{}")
    assert before(write("student", GRPO, model=base, reference=teacher)) == [base]


def test_nobody_learns_from_himself() -> None:
    write("teacher", GRPO, reference="student.yaml")
    path = write("student", GRPO, reference="teacher.yaml")
    with pytest.raises(ValueError, match=r"teacher\.yaml: reference\.recipe: student\.yaml would"):
        before(path)
