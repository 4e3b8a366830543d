"""Recipes for the checks: the demo's, on a data set and a model that a test has made."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe

TINY = "{kind: tiny, hidden_size: 64, num_layers: 1, num_heads: 1}"
ROWS = [
    {"prompt": "Two and two is ", "completion": "4", "answer": "4"},
    {"prompt": "One? ", "completion": "1", "answer": "1"},
]


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A data set of these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(folder: Path, *overrides: str, rows: Sequence[dict[str, Any]] = ROWS) -> GrpoRecipe:
    """The demo with these rows, a tiny model and the overrides; it leaves what it leaves in the folder."""
    data = f"{{path: {written(folder, rows)}, shuffle: false}}"
    recipe = load_recipe("recipes/demo.yaml", [f"run_dir={folder}/run", f"model={TINY}", f"dataset={data}", *overrides])
    assert isinstance(recipe, GrpoRecipe)
    return recipe
