"""A schedule's arguments that cannot be are refused with the key and the fix when the recipe is read."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.recipe.file import RecipeError, load_recipe

SFT: dict[str, Any] = {
    "kind": "sft", "name": "x", "steps": 10, "batch_size": 4, "model": {"kind": "tiny"}, "dataset": {"path": "d.jsonl"},
}  # fmt: skip
PPO: dict[str, Any] = {
    "kind": "grpo", "name": "x", "steps": 10, "groups_per_batch": 4, "model": {"kind": "tiny"},
    "dataset": {"path": "d.jsonl"}, "rewards": {"functions": [{"function": "rewards.py:score"}]},
    "algorithm": {"advantage": "gae", "baseline": "none", "scale_rewards": "none"},
    "pools": {"critic": {"num_workers": 1}},
}  # fmt: skip

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        "lr_scheduler_type: 'reduce_lr_on_plateau' is not one of 'constant', ",
    ),
    (
        {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"power": 2}},
        "lr_scheduler_kwargs.power: lr_scheduler_type 'linear' takes no arguments, leave it out; 'polynomial' has it",
    ),
    (
        {"lr_scheduler_kwargs": {"min_lr": 2}},
        "lr_scheduler_kwargs.min_lr: lr_scheduler_type 'constant_with_warmup' takes no arguments, leave it out; "
        "'cosine_with_min_lr' and 'cosine_warmup_with_min_lr' have it",
    ),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 2}},
        "lr_scheduler_kwargs.powr: lr_scheduler_type 'polynomial' takes 'lr_end', 'power'",
    ),
    (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": True}},
        "lr_scheduler_kwargs.power: True is not what it must be; write a number greater than 0",
    ),
    (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1.5}},
        "lr_scheduler_kwargs.num_cycles: 1.5 is not what it must be; write a whole number, at least 1",
    ),
    (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs: lr_scheduler_type 'cosine_with_min_lr' ends at a floor; write either min_lr",
    ),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7, "min_lr_rate": 0.1}},
        "lr_scheduler_kwargs: lr_scheduler_type 'cosine_with_min_lr' ends at a floor; write either min_lr",
    ),
    (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        "lr_scheduler_kwargs.min_lr: 0.001 is above the learning rate 1e-06; lower it",
    ),
    (
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7},
        "lr_scheduler_kwargs.lr_end: 1e-07 is not below the learning rate 1e-07; lower it",
    ),
    (
        {"lr_scheduler_type": "polynomial", "warmup_steps": 10},
        "warmup_steps: 10 are all steps of the run, and lr_scheduler_type 'polynomial' needs one to decay in; lower it",
    ),
    (
        {"lr_scheduler_type": "warmup_stable_decay"},
        "lr_scheduler_kwargs.num_decay_steps: required by lr_scheduler_type 'warmup_stable_decay', but missing; add it",
    ),
    (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}, "warmup_steps": 6},
        "lr_scheduler_kwargs.num_decay_steps: 5 steps of decay and 6 of warm-up are more than the run's 10; lower one",
    ),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 5, "num_stable_steps": 1},
            "warmup_steps": 2,
        },
        "lr_scheduler_kwargs.num_stable_steps: 1 steps between 2 of warm-up and 5 of decay make 8, but the run has 10; "
        "write 3, or leave it out",
    ),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 5, "num_stable_steps": 4},
            "warmup_steps": 2,
        },
        "lr_scheduler_kwargs.num_stable_steps: 4 steps between 2 of warm-up and 5 of decay make 11, but the run has 10",
    ),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 5, "num_stable_steps": 0},
            "warmup_steps": 6,
        },
        "lr_scheduler_kwargs.num_decay_steps: 5 steps of decay and 6 of warm-up are more than the run's 10; lower one",
    ),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 5, "decay_type": "exp"},
        },
        "lr_scheduler_kwargs.decay_type: 'exp' is not what it must be; write one of 'linear', 'cosine', '1-sqrt'",
    ),
    ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs: 3 is not a mapping"),
]


def refusal(tmp_path: Path, recipe: dict[str, Any]) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(("optimizer", "expected"), REFUSED)
def test_what_cannot_be_is_refused_by_its_key(tmp_path: Path, optimizer: dict[str, Any], expected: str) -> None:
    found = refusal(tmp_path, SFT | {"optimizer": optimizer})
    assert found.startswith(f"optimizer.{expected}")
    assert "\n" not in found


def test_the_schedule_must_hold_for_the_critics_learning_rate_too(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-4}}
    expected = "optimizer.lr_scheduler_kwargs.lr_end: 0.0001 is not below the learning rate 1e-05; lower it, or raise"
    assert refusal(tmp_path, PPO | {"optimizer": optimizer}).startswith(f"{expected} critic.learning_rate")


def test_arguments_are_read_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(SFT | {"optimizer": {"lr_scheduler_type": "cosine_with_min_lr"}}))
    optimizer = load_recipe(path, ["optimizer.lr_scheduler_kwargs.min_lr_rate=0.1"]).optimizer
    assert optimizer.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_steps_of_warmup_plateau_and_decay_that_make_the_run_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    counts = {"num_decay_steps": 5, "num_stable_steps": 3}
    optimizer = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": counts, "warmup_steps": 2}
    path.write_text(yaml.safe_dump(SFT | {"optimizer": optimizer}))
    assert load_recipe(path).optimizer.lr_scheduler_kwargs == counts


def test_reading_a_recipe_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from actors.recipe.file import load_recipe; load_recipe('recipes/demo.yaml', "
        "['optimizer.lr_scheduler_type=cosine']); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)
