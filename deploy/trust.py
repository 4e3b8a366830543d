"""Whose code a run executes beside our own is said before it starts."""

from collections.abc import Iterable

from actors.recipe.model import PretrainedModel
from actors.recipe.schema import GrpoRecipe, Recipe


def trusted_code(recipes: Iterable[Recipe]) -> list[str]:
    """A warning for each model whose own Python code the recipes let run, with the revision that would run."""
    found = []
    for recipe in recipes:
        reference = recipe.reference if isinstance(recipe, GrpoRecipe) else None
        for key, model in (("model", recipe.model), ("reference", reference)):
            if isinstance(model, PretrainedModel) and model.trust_remote_code:
                path, revision = model.path, model.revision
                which = f"of revision {revision}" if revision else "of whatever revision is the newest then"
                found.append(
                    f"warning: {key}.trust_remote_code is on: the Python code that comes with {path}, {which}, runs on "
                    "the workers and on this machine"
                )
    return list(dict.fromkeys(found))
