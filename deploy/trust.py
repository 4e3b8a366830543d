"""Whose code a run executes beside our own is said before it starts."""

from collections.abc import Iterable

from actors.recipe.model import PretrainedModel, RecipeModel
from actors.recipe.schema import GrpoRecipe, Recipe


def trusted_code(recipes: Iterable[Recipe]) -> list[str]:
    """A warning for each model whose own Python code the recipes let run, with the revision that would run."""
    found = []
    for recipe in recipes:
        models = [("model", recipe.model), *_others(recipe)]
        for key, model in models:
            if isinstance(model, PretrainedModel) and model.trust_remote_code:
                path, revision = model.path, model.revision
                which = f"of revision {revision}" if revision else "of whatever revision is the newest then"
                found.append(
                    f"warning: {key}.trust_remote_code is on: the Python code that comes with {path}, {which}, runs on "
                    "the workers and on this machine"
                )
    return list(dict.fromkeys(found))


def _others(recipe: Recipe) -> list[tuple[str, PretrainedModel | RecipeModel | None]]:
    if not isinstance(recipe, GrpoRecipe):
        return []
    return [("reference", recipe.reference), ("critic.model", recipe.critic_model)]
