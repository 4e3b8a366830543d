"""A recipe may start from the model that another recipe leaves: those come first, and never in a circle."""

from pathlib import Path

from actors.recipe.file import load_recipe
from actors.recipe.model import RecipeModel
from actors.recipe.schema import Recipe
from actors.run.folder import RunFolder


def trained_before(recipe: Recipe, path: str) -> list[tuple[str, Recipe]]:
    """The recipes whose models are needed and not there yet, with their paths, in the order in which they are to run.

    `path` names the recipe itself in messages; ValueError when a recipe would be trained before itself.
    """
    seen = [Path(path)]
    before: list[tuple[str, Recipe]] = []
    while isinstance(recipe.model, RecipeModel):
        above, path = path, recipe.model.recipe
        if Path(path) in seen:
            raise ValueError(f"{above}: model.recipe: {path} would be trained before itself; name another recipe")
        seen.append(Path(path))
        recipe = load_recipe(path)
        if RunFolder(recipe.folder).finished:
            break
        before.insert(0, (path, recipe))
    return before
