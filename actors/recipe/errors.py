"""Every error of pydantic about a recipe becomes one dotted key, what is wrong there, and the fix.

pydantic's paths carry the tags of unions (`model.tiny.num_layers`); ours are what the user typed (`model.num_layers`).
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from actors.recipe.plain_yaml import FLOAT, INT
from actors.recipe.schema import Recipe

Key = tuple[str | int, ...]
"""Place of a value in the recipe: names of keys and indices of lists."""


def explain(errors: Sequence[ErrorDetails]) -> list[tuple[Key, str]]:
    """For each error the key that it is about, and what is wrong in the words of the recipe."""
    return [_explain(error) for error in errors if not _is_echo(error)]


def _is_echo(details: ErrorDetails) -> bool:
    """Whether a list is called short only because pydantic dropped its bad entries, which have errors of their own."""
    return details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]


def _explain(details: ErrorDetails) -> tuple[Key, str]:
    """One error; what pydantic gives it is told apart by its type."""
    place = _locate(details["loc"])
    given, context = details["input"], details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return place.keys, f"unknown key; {_suggest(place)}"
        case "missing":
            return place.keys, f"required, but missing; add it: {_wanted(place.annotation)}{place.purpose}"
        case "union_tag_not_found":
            return (*place.keys, "kind"), f"required, but missing; add it: {_one_of(_kinds(place.annotation))}"
        case "union_tag_invalid":
            return (*place.keys, "kind"), _unlisted(given["kind"], _kinds(place.annotation))
        case "literal_error":
            return place.keys, _unlisted(given, get_args(_bare(place.annotation)))
        case "value_error":
            return _split(place, str(context["error"]))
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return place.keys, f"{show(given)} is out of range; it must be {_bound(context)}"
        case "too_short":
            return place.keys, f"the list has too few entries; write at least {context['min_length']}"
        case "string_too_short":
            return place.keys, f"the text is too short; write at least {context['min_length']} character(s)"
        case "string_pattern_mismatch":
            return (
                place.keys,
                f"{show(given)} is not of the right form; it must match {context['pattern']}{place.purpose}",
            )
        case kind if kind.endswith("_type") or kind == "int_from_float":
            return place.keys, _mistyped(given, place.annotation)
        case _:
            return place.keys, f"{show(given)} is refused: {details['msg']}"


# ---- Places


@dataclass(frozen=True)
class _Place:
    """A spot in the schema of recipes."""

    keys: Key
    annotation: Any
    """What may stand there."""
    owner: type[BaseModel] | None
    """The model whose key it is; None within lists and free mappings."""
    family: tuple[type[BaseModel], ...]
    """The owner, and the models that could stand in its place under another `kind`."""
    recipe: type[BaseModel] | None
    """The kind of recipe that it is in."""

    @property
    def purpose(self) -> str:
        """What the key is for, from its docstring, as ` (...)`; empty when it has none."""
        known = self.owner.model_fields.get(str(self.keys[-1])) if self.owner else None
        text = " ".join((known.description or "").split()) if known else ""
        return f" ({text.rstrip('.')})" if text else ""


def _locate(loc: tuple[str | int, ...]) -> _Place:
    """Follow pydantic's path through the models, leaving out what is no key: the tags of unions."""
    keys: list[str | int] = []
    at: Any = Recipe
    owner: type[BaseModel] | None = None
    recipe: type[BaseModel] | None = None
    family: tuple[type[BaseModel], ...] = ()
    for part in loc:
        models = _models(at)
        if isinstance(part, int):
            keys.append(part)
            at, owner = next(iter(get_args(_bare(at))), None), None
        elif len(models) > 1:
            family = models
            at = next(model for model in models if _kind(model) == part)
            recipe = recipe or at
        elif models:
            keys.append(part)
            owner = models[0]
            family = family if owner in family else models
            at = owner.model_fields[part].annotation if part in owner.model_fields else None
    return _Place(tuple(keys), at, owner, family, recipe)


def _models(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The models that may stand here: none for plain values, several where `kind` tells them apart."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return tuple(model for member in get_args(annotation) for model in _models(member))
    return ()


def _bare(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        members = [member for member in get_args(annotation) if member is not NoneType]
        return _bare(members[0]) if len(members) == 1 else annotation
    return annotation


def _kind(model: type[BaseModel]) -> str | None:
    """The tag of a member of a union."""
    tag = model.model_fields.get("kind")
    return str(get_args(tag.annotation)[0]) if tag else None


def _kinds(annotation: Any) -> tuple[str | None, ...]:
    return tuple(_kind(model) for model in _models(annotation))


def _split(place: _Place, message: str) -> tuple[Key, str]:
    """A validator's `key: text`, its key counted from the model, or from the key, that the validator belongs to."""
    head, colon, text = message.partition(": ")
    names = head.split(".")
    if colon and any(names[0] in model.model_fields for model in _models(place.annotation)):
        return (*place.keys, *(int(name) if name.isdecimal() else name for name in names)), text
    if colon and place.keys and head == place.keys[-1]:
        return place.keys, text
    return place.keys, message


def _suggest(place: _Place) -> str:
    """The valid key that was probably meant: the same one elsewhere, one that looks like it, or else all valid ones."""
    assert place.owner is not None
    assert place.recipe is not None
    unknown, kind = str(place.keys[-1]), _kind(place.owner)
    valid = f"valid keys{f' of kind {kind!r}' if kind else ''}: {', '.join(place.owner.model_fields)}"
    cousin = next((model for model in place.family if unknown in model.model_fields), None)
    if cousin:
        return f"it belongs to kind {_kind(cousin)!r}, and this is kind {kind!r}; {valid}"
    near = difflib.get_close_matches(unknown, place.owner.model_fields, n=1)
    elsewhere = [key for key in all_keys(place.recipe) if key.rpartition(".")[2] == unknown]
    if near or elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere[:3] or near))}?"
    return valid


def all_keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every dotted key of a model."""
    for name, known in model.model_fields.items():
        yield above + name
        for below in _models(known.annotation):
            yield from all_keys(below, f"{above}{name}.")


# ---- Words


_TEXT = "write text, in quotes if it looks like something else"
_TYPES: dict[Any, tuple[str, str]] = {
    int: ("an integer", "write a whole number such as 8"),
    float: ("a number", "write one such as 0.5"),
    bool: ("a boolean", "write true or false"),
    str: ("a string", _TEXT),
    Path: ("a path", _TEXT),
    list: ("a list", "write its entries in [brackets], or each on its own line after '- '"),
    dict: ("a mapping", "write its keys as 'key: value' on lines below it"),
}


def _type(annotation: Any) -> Any:
    """Which row of the table an annotation belongs to."""
    bare = _bare(annotation)
    if _models(bare):
        return dict
    origin = get_origin(bare) or bare
    return list if origin is tuple else origin


def _wanted(annotation: Any) -> str:
    """What a key wants, with its article, and with the keys that it cannot do without."""
    if get_origin(_bare(annotation)) is Literal:
        return _one_of(get_args(_bare(annotation)))
    what = _TYPES.get(_type(annotation), ("a value", ""))[0]
    demands = [{name for name, key in model.model_fields.items() if key.is_required()} for model in _models(annotation)]
    required = sorted(set.intersection(*demands)) if demands else []
    return f"{what} with {', '.join(map(repr, required))}" if required else what


def _mistyped(given: Any, annotation: Any) -> str:
    """A value of the wrong type, and what to write in its place."""
    wanted = _type(annotation)
    what, fix = _TYPES.get(wanted, ("what belongs here", "see the recipe's models"))
    if given is None:
        return f"is empty, which is not {what}; {fix}, or leave the key out"
    match given:
        case str() if wanted in (int, float) and (INT if wanted is int else FLOAT).match(given):
            fix = "remove the quotes"
        case float() if wanted is int and given.is_integer():
            fix = f"write {int(given)}"
        case int() | float() if wanted in (str, Path):
            fix = f"put it in quotes: '{show(given)}'"
    return f"{show(given)} is not {what}; {fix}{', or null' if NoneType in get_args(annotation) else ''}"


def _unlisted(given: Any, allowed: Sequence[Any]) -> str:
    """A value that is not among the listed ones."""
    near = difflib.get_close_matches(given, [str(value) for value in allowed], n=1) if isinstance(given, str) else []
    return f"{show(given)} is not {_one_of(allowed)}{f'; did you mean {near[0]!r}?' if near else ''}"


def _one_of(values: Sequence[Any]) -> str:
    return f"one of {', '.join(map(repr, values))}" if len(values) > 1 else repr(values[0])


def _bound(context: Mapping[str, Any]) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return " and ".join(f"{word} {context[sign]:g}" for sign, word in words.items() if sign in context)


def dotted(keys: Sequence[str | int]) -> str:
    """A key as the user writes it."""
    return ".".join(map(str, keys))


def show(value: Any) -> str:
    """A value as the user wrote it, cut to a length that fits a line."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]}...{text[-1]}"
