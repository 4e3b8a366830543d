"""A recipe file either becomes one whole Recipe or is refused with every error named: file, dotted key, and the fix.

An override is `dotted.key=value`: its value is read like one in the file, its key may index lists
(`rewards.functions.0.weight=2`). Types are strict: no string is taken for a number and no boolean for an integer, but
an integer may stand for a float.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from actors.recipe.errors import Key, dotted, explain, show
from actors.recipe.plain_yaml import PlainYamlError, parse, write
from actors.recipe.schema import Recipe
from algorithms.config import STORED

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Annotated[Recipe, Field(discriminator="kind")])


class RecipeError(ValueError):
    """The recipe cannot be used; one line for each error, each naming its source, its key and the fix."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file with the overrides laid over it, or a RecipeError that names all errors found."""
    draft = _Draft(str(path), _read(Path(path)))
    for text in overrides:
        draft.override(text)
    return _whole(draft)


def load_stored(path: str | Path) -> Recipe:
    """The recipe that a run has left in its folder: what was legal when it was written is no reason to refuse the run.

    The user's own recipe says how the run goes on, and is held to what is legal now.
    """
    draft = _Draft(str(path), _read(Path(path)))
    checkpoint, optimizer = draft.tree.get("checkpoint"), draft.tree.get("optimizer")
    if isinstance(checkpoint, dict) and checkpoint.get("keep") == 1:  # the least was 1, and is 2
        checkpoint["keep"] = 2
    if isinstance(optimizer, dict) and optimizer.get("lr_scheduler_type") == "constant":  # it had no effect there
        optimizer["warmup_steps"] = 0
    return _whole(draft, STORED)


def dump_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the recipe with every default spelled out, such that `load_recipe` reads back an equal object."""
    tree = recipe.model_dump(mode="json")
    text = write({"kind": tree.pop("kind"), **tree})
    Path(path).write_text(f"# The resolved recipe of run '{recipe.name}': every value, defaults too.\n{text}", "utf-8")


def _read(path: Path) -> dict[str, Any]:
    """The mapping in the file; anything else is an error that names the file."""
    try:
        tree = parse(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; {_siblings(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; name a recipe file in it") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except PlainYamlError as error:
        raise RecipeError(f"{path}: line {error.line}: {error}" if error.line else f"{path}: {error}") from None
    if tree is None:
        raise RecipeError(f"{path}: is empty; a recipe begins with its kind, such as 'kind: grpo' or 'kind: sft'")
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: holds {show(tree)} where a recipe is a mapping; write its keys as 'key: value'")
    return tree


def _siblings(path: Path) -> str:
    """Which recipes lie where this one was looked for."""
    folder = path.parent
    names = sorted(file.name for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern))
    if names:
        return f"recipes in {folder}: {', '.join(names)}"
    return f"there are no recipes in {folder}" if folder.is_dir() else f"there is no folder {folder}"


@dataclass(frozen=True)
class _Override:
    """One `dotted.key=value` that was laid over; every error at or below `root` is its doing."""

    text: str
    root: Key


@dataclass
class _Draft:
    """The plain data of a recipe to be, who wrote which part of it, and what is wrong with it."""

    path: str
    tree: dict[str, Any]
    overrides: list[_Override] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def override(self, text: str) -> None:
        """Lay one override over the data, or note why that cannot be done."""
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            self.errors.append(f"override {text!r}: write it as dotted.key=value, such as steps=100")
            return
        try:
            root = _set(self.tree, parts, parse(value))
        except (_NoSuchPlaceError, PlainYamlError) as error:
            self.errors.append(f"override {text!r}: {error}")
        else:
            self.overrides.append(_Override(text, root))

    def refuse(self, keys: Key, problem: str) -> None:
        """Note an error under the name of whoever wrote the key: the last override that did, or else the file."""
        source = self.path
        for override in self.overrides:
            if keys[: len(override.root)] == override.root:
                source = f"override {override.text!r}"
        self.errors.append(": ".join(part for part in (source, dotted(keys), problem) if part))


class _NoSuchPlaceError(ValueError):
    """An override's key leads nowhere."""


def _set(tree: dict[str, Any], parts: Sequence[str], value: Any) -> Key:
    """Set one value, making missing mappings on the way; returns the topmost key that is new or changed."""
    at: Any = tree
    keys: list[str | int] = []
    root: Key | None = None
    for part in parts[:-1]:
        key = _key(at, part, keys)
        keys.append(key)
        if isinstance(at, dict) and at.get(key) is None:
            at[key] = {}
            root = root or tuple(keys)
        at = at[key]
    last = _key(at, parts[-1], keys)
    at[last] = value
    return root or (*keys, last)


def _key(at: Any, part: str, above: Sequence[str | int]) -> str | int:
    """The part as a key of the mapping, or as an index of the list, that it is to be looked up in."""
    if isinstance(at, dict):
        return part
    where = dotted(above)
    if not isinstance(at, list):
        raise _NoSuchPlaceError(f"{where}: is {show(at)}, which has no keys; set {where} as a whole")
    if not part.isdecimal() or int(part) >= len(at):
        indices = f"has the indices 0 to {len(at) - 1}" if at else "is empty"
        raise _NoSuchPlaceError(f"{where}: there is no {part!r} in this list; it {indices}")
    return int(part)


def _whole(draft: _Draft, context: Any = None) -> Recipe:
    recipe = _validate(draft, context)
    if recipe is None or draft.errors:
        raise RecipeError("\n".join(draft.errors))
    return recipe


def _validate(draft: _Draft, context: Any) -> Recipe | None:
    """The recipe, if the data make one; otherwise the draft notes why they do not."""
    try:
        # JSON is pydantic's strict mode for files: lists become tuples, strings become paths, and nothing is guessed.
        return _RECIPE.validate_json(json.dumps(draft.tree), strict=True, context=context)
    except ValidationError as error:
        for keys, problem in explain(error.errors(include_url=False)):
            draft.refuse(keys, problem)
    return None
