"""A recipe's files and folders are listed in one place, and a new key that names one cannot be forgotten there."""

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from actors.recipe.file import load_recipe
from actors.recipe.named import named
from actors.recipe.schema import Recipe
from placement.config import PoolsConfig

WHOLE = """
kind: grpo
name: whole
steps: 1
groups_per_batch: 2
model: {kind: recipe, recipe: first.yaml, chat_template: chat.jinja}
reference: {kind: pretrained, path: Qwen/teacher}
critic: {model: {kind: pretrained, path: models/critic}}
dataset: {path: data/rows.jsonl}
rewards:
  functions:
    - {function: "rewards/mine.py:exact"}
    - {function: "package.module:f"}
    - {model: models/judge}
algorithm: {num_generations: 2, beta: 0.1, advantage: gae, baseline: none, scale_rewards: none}
pools: {critic: {num_workers: 1}}
"""
OF_A_POOL = ("node_resource", "node_labels", "colocate_with")
NO_FILES = {
    "name", "run_dir", "dataset.name", "dataset.split", "dataset.revision", "dataset.task", "dataset.prompt_suffix",
    "model.revision", "reference.revision", "critic.model.revision", "policy.lora.target_modules",
    "optimizer.lr_scheduler_kwargs", "logging.wandb_project", "checkpoint.best.metric", "simulation.lengths.path",
    *(f"pools.{pool}.{key}" for pool in PoolsConfig.model_fields for key in OF_A_POOL),
}  # fmt: skip
"""Texts that name neither a file nor a folder, or one that a run does not read."""


def texts(annotation: Any, key: str = "") -> Iterator[str]:
    """Keys of a type that may hold text; entries of a list bear no number."""
    if annotation in (str, Path):
        yield key
    elif inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from texts(field.annotation, f"{key}.{name}".strip("."))
    elif typing.get_origin(annotation) is not Literal:
        for part in typing.get_args(annotation):
            yield from texts(part, key)


def test_what_a_recipe_names_is_listed(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text(WHOLE)
    found = {each.key: (each.name, each.kind) for each in named(load_recipe(str(tmp_path / "whole.yaml")))}
    assert found == {
        "dataset.path": ("data/rows.jsonl", "data"),
        "model.recipe": ("first.yaml", "file"),
        "model.chat_template": ("chat.jinja", "file"),
        "reference.path": ("Qwen/teacher", "model"),
        "critic.model.path": ("models/critic", "model"),
        "rewards.functions.0.function": ("rewards/mine.py", "file"),
        "rewards.functions.2.model": ("models/judge", "model"),
    }


def test_a_judge_is_a_file_as_well(tmp_path: Path) -> None:
    judge = 'rewards: {functions: [{judge: "rewards/judge.py:better"}]}'
    without = WHOLE.partition("rewards:")[0] + judge + "\nonline_dpo: {}\nalgorithm: {num_generations: 2, beta: 0.1}\n"
    (tmp_path / "judged.yaml").write_text("\n".join(line for line in without.splitlines() if "critic" not in line))
    found = [each for each in named(load_recipe(str(tmp_path / "judged.yaml"))) if each.key.endswith("judge")]
    assert [(each.name, each.kind) for each in found] == [("rewards/judge.py", "file")]


def test_every_text_of_a_recipe_is_known_to_name_a_file_or_not() -> None:
    listed = {
        "dataset.path", "model.path", "model.recipe", "model.chat_template", "reference.path", "reference.recipe",
        "critic.model.path", "rewards.functions.function", "rewards.functions.judge", "rewards.functions.model",
    }  # fmt: skip
    assert set(texts(Recipe)) == listed | NO_FILES
