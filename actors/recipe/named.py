"""What a recipe names beside itself, in one list: files, folders, and names of the hub that look like them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from actors.recipe.model import ModelConfig, PretrainedModel, RecipeModel, ReferenceConfig
from actors.recipe.schema import GrpoRecipe, Recipe


@dataclass(frozen=True, slots=True)
class Named:
    """One value of a recipe."""

    key: str
    name: str
    kind: Literal["file", "data", "model"]
    """A file for sure; or what may be the hub's as well: a data set (or a generated task) or a model."""


def named(recipe: Recipe) -> Iterator[Named]:
    """All that has to be where the run is; the run folder, and modules that are imported, are not among it."""
    yield Named("dataset.path", recipe.dataset.path, "data")
    yield from _model("model", recipe.model)
    if recipe.model.chat_template is not None:
        yield Named("model.chat_template", recipe.model.chat_template, "file")
    if isinstance(recipe, GrpoRecipe):
        if recipe.reference is not None:
            yield from _model("reference", recipe.reference)
        if recipe.critic_model is not None:
            yield from _model("critic.model", recipe.critic_model)
        for index, reward in enumerate(recipe.rewards.functions):
            for key, source in (("function", reward.function), ("judge", reward.judge)):
                file = (source or "").rpartition(":")[0]
                if file.endswith(".py") or "/" in file:
                    yield Named(f"rewards.functions.{index}.{key}", file, "file")
            if reward.model is not None:
                yield Named(f"rewards.functions.{index}.model", reward.model, "model")


def _model(key: str, model: ModelConfig | ReferenceConfig) -> Iterator[Named]:
    match model:
        case PretrainedModel(path=path):
            yield Named(f"{key}.path", path, "model")
        case RecipeModel(recipe=recipe):
            yield Named(f"{key}.recipe", recipe, "file")
