"""A recipe may start or learn from the model that another recipe leaves: those come first, and never in a circle."""

from collections.abc import Iterator
from pathlib import Path

from actors.recipe.file import load_recipe
from actors.recipe.model import RecipeModel
from actors.recipe.schema import GrpoRecipe, Recipe
from actors.run.folder import RunFolder


def trained_before(recipe: Recipe, path: str) -> list[tuple[str, Recipe]]:
    """The recipes whose models are needed and not there yet, with their paths, in the order in which they are to run.

    `path` names the recipe itself in messages; ValueError when a recipe would be trained before itself.
    """
    before: dict[Path, tuple[str, Recipe]] = {}
    _add(recipe, path, (Path(path),), before)
    return list(before.values())


def _add(recipe: Recipe, path: str, above: tuple[Path, ...], before: dict[Path, tuple[str, Recipe]]) -> None:
    """What comes before the recipe, before it; `above` are those that wait for it, itself included."""
    for key, first in _needed(recipe):
        if Path(first) in above:
            raise ValueError(f"{path}: {key}: {first} would be trained before itself; name another recipe")
        source = load_recipe(first)
        if not RunFolder(source.folder).finished and Path(first) not in before:
            _add(source, first, (*above, Path(first)), before)
            before[Path(first)] = (first, source)


def _needed(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The keys that name other recipes, and the paths of those."""
    if isinstance(recipe.model, RecipeModel):
        yield "model.recipe", recipe.model.recipe
    if isinstance(recipe, GrpoRecipe) and isinstance(recipe.reference, RecipeModel):
        yield "reference.recipe", recipe.reference.recipe
