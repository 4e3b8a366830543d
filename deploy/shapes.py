"""The shape of a recipe's models, from their config.json: in a folder here, or in the hub's cache of this machine."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.utils import HFValidationError

from actors.recipe.file import load_recipe
from actors.recipe.model import ModelConfig, PretrainedModel, RecipeModel, ReferenceConfig, TinyModel
from actors.recipe.schema import GrpoRecipe, Recipe
from actors.run.folder import RunFolder
from placement.memory.shape import ModelShape, shape_of


def model_shape(recipe: Recipe) -> ModelShape | None:
    """Of the recipe's model; None for tiny models, which fit anywhere. ValueError says why the shape is not known."""
    return _shape(recipe.model, "model")


def reference_shape(recipe: GrpoRecipe, policy: ModelShape) -> ModelShape:
    """The policy's, or that of a reference of its own; ValueError as above."""
    return policy if recipe.reference is None else _shape(recipe.reference, "reference") or policy


def critic_shape(recipe: GrpoRecipe, policy: ModelShape) -> ModelShape:
    """The policy's, or that of a critic of its own; ValueError as above."""
    model = recipe.critic_model
    return policy if model is None else _shape(model, "critic.model") or policy


def _shape(model: ModelConfig | ReferenceConfig, key: str) -> ModelShape | None:
    match model:
        case TinyModel():
            return None
        case RecipeModel(recipe=path):
            first = load_recipe(path)
            config = RunFolder(first.folder).model / "config.json"
            return _read(config) if config.is_file() else model_shape(first)
        case PretrainedModel(path=name, revision=revision):
            return _pretrained(name, revision, f"{key}.path")


def _pretrained(name: str, revision: str | None, key: str) -> ModelShape:
    local = Path(name).expanduser()
    if local.is_dir():
        return _read(local / "config.json")
    try:
        cached: Any = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return _read(Path(cached))
    raise ValueError(f"{name} is not on this machine; a folder with its config.json will do: {key}=FOLDER")


def _read(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no mapping")
    try:
        return shape_of(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
