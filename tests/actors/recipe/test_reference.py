"""A teacher must be asked for, and read the policy's tokens; punishments begin within a completion."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.model.load import load_tokenizer
from actors.model.tiny import make_tiny_model
from actors.recipe.file import RecipeError, load_recipe
from actors.recipe.model import TinyModel
from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe
from deploy.train import prepare

ROOT = Path(__file__).parents[3]
DISTILLATION = str(ROOT / "recipes/methods/on_policy_distillation.yaml")
SIZE: dict[str, Any] = {"kind": "tiny", "hidden_size": 64, "num_layers": 1, "num_heads": 1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.beta=0", "algorithm.kl_penalty=k3"], "reference: nothing is measured against it"),
        (["algorithm.soft_punish_cache=13"], "algorithm.soft_punish_cache: 13 tokens before a limit of 12"),
        (["reference={kind: tiny}"], "reference"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(DISTILLATION, overrides)
    assert message in str(error.value)


@pytest.fixture
def student(tmp_path: Path) -> list[str]:
    """Overrides: a tiny student, on data and rewards that are there."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a row"}) + "\n")
    return [
        f"model={json.dumps(SIZE)}",
        f"dataset={{path: {tmp_path}/rows.jsonl}}",
        f"rewards.functions.0.function={ROOT}/tests/chaos/reward.py:score",
        f"run_dir={tmp_path}/run",
        f"reference={{kind: pretrained, path: {tmp_path}/teacher}}",
    ]


def teacher(folder: Path, **changed: Any) -> Path:
    make_tiny_model(TinyModel(**SIZE | changed), folder / "teacher", seed=1)
    return folder / "teacher"


def test_a_teacher_of_the_same_family_is_taken(student: list[str], tmp_path: Path) -> None:
    teacher(tmp_path, hidden_size=96, num_layers=2)
    (job,) = prepare(load_recipe(DISTILLATION, student), DISTILLATION, None, False)
    assert job.folder.path == tmp_path / "run"


def test_a_teacher_with_fewer_positions_is_refused(student: list[str], tmp_path: Path) -> None:
    teacher(tmp_path, max_position_embeddings=128)
    with pytest.raises(ValueError, match=r"reference: it has 128 positions, the policy 256; choose"):
        prepare(load_recipe(DISTILLATION, student), DISTILLATION, None, False)


def test_a_teacher_with_another_tokenizer_is_refused(student: list[str], tmp_path: Path) -> None:
    path = teacher(tmp_path)
    tokenizer = load_tokenizer(str(path), None, False)
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=r"reference: its tokenizer is not the policy's.*same family"):
        prepare(load_recipe(DISTILLATION, student), DISTILLATION, None, False)


GKD = str(ROOT / "recipes/methods/gkd.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reference=null"], "distillation: there is no teacher; name it under reference"),
        (["algorithm.beta=0.1"], "algorithm.beta: 0.1 would weigh a KL penalty, and distillation has none"),
        (["algorithm.epsilon=0.3"], "algorithm.epsilon: it has no effect beside distillation"),
        (["staleness.adapt_depth={}"], "staleness.adapt_depth: the sample size that it follows is not measured"),
        (["distillation.lmbda=0"], "distillation.lmbda"),
    ],
)
def test_what_distillation_would_ignore_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(GKD, overrides)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_distillation_needs_one_sample_of_a_prompt_alone() -> None:
    """There is no baseline, though one rollout a group is allowed only where the recipe says that there is none."""
    alone = ["algorithm.num_generations=1", "algorithm.baseline=none", "algorithm.scale_rewards=none"]
    recipe = load_recipe(GKD, alone)
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.algorithm.num_generations == 1
    with pytest.raises(RecipeError, match=r"algorithm\.baseline: it has no effect beside distillation"):
        load_recipe(GKD, ["algorithm.baseline=none", "algorithm.scale_rewards=none"])


def test_data_without_completions_are_refused_unless_only_samples_are_learned(
    student: list[str], tmp_path: Path
) -> None:
    teacher(tmp_path)
    with pytest.raises(ValueError, match=r"distillation.lmbda: 0.5 learns from the data, too: .*no column"):
        prepare(load_recipe(GKD, student), GKD, None, False)
    (job,) = prepare(load_recipe(GKD, [*student, "distillation.lmbda=1.0"]), GKD, None, False)
    assert "reference" not in used_pools(job.recipe), "each policy rank holds the teacher"
