"""`python -m tests.docs.recipe_keys > docs/recipe.md` writes the guide to every key of a recipe, from the recipes' own
classes; a test holds the guide to it."""

import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from actors.recipe.base import BaseRecipe, OfflineRecipe
from actors.recipe.preference import CpoRecipe, DpoRecipe, KtoRecipe, OrpoRecipe, RewardRecipe
from actors.recipe.schema import GrpoRecipe, SftRecipe

_HEAD = """# Every key of a recipe

Keys are written here with dots, as on the command line (`policy.zero_stage=2`); in the file they are nested. A key that
is not here is an error. `kind` says which recipe it is: `grpo`, or one that learns from data alone, `sft`, `dpo`,
`kto`, `orpo`, `cpo` or `reward`. What a run has made of its recipe, every default spelled out, is in `recipe.yaml` in
its folder. How the keys of other trainers are called here: [moving.md](moving.md).

This page is written by `python -m tests.docs.recipe_keys > docs/recipe.md`.
"""
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", dict: "mapping"}
_UNIONS = (typing.Union, types.UnionType)


def page() -> str:
    """The guide."""
    kinds = (SftRecipe, DpoRecipe, KtoRecipe, OrpoRecipe, CpoRecipe, RewardRecipe)
    sections = {
        "All kinds": BaseRecipe,
        "`kind: grpo`": GrpoRecipe,
        "All kinds that learn from data alone": OfflineRecipe,
    }
    sections |= {f"`kind: {_tag(kind)}`": kind for kind in kinds}
    writer = _Writer()
    lines = [_HEAD]
    for title, kind in sections.items():
        lines += [f"## {title}", "", *writer.section("", kind)]
    return "\n".join(lines).rstrip("\n") + "\n"


class _Writer:
    """Whatever has been written once is referred to afterwards."""

    def __init__(self) -> None:
        self._places: dict[type[BaseModel], str] = {BaseModel: ""}

    def section(self, above: str, model: type[BaseModel]) -> Iterator[str]:
        """What the class says, its own keys, and then the sections below it."""
        yield _sentence(model)
        base = next((base for base in model.__mro__[1:] if base in self._places), BaseModel)
        if self._places[base]:
            yield f"Besides the keys of {self._places[base]}:"
        self._places[model] = f"`{above.rstrip('.')}`" if above else ""
        fields = {name: field for name, field in model.model_fields.items() if name not in base.model_fields}
        rows = [row for name, field in fields.items() if (row := self._row(above, name, field)) is not None]
        yield from ("", *_table(rows)) if rows else ("",)
        for name, field in fields.items():
            yield from self._below(above + name, field)

    def _row(self, above: str, name: str, field: FieldInfo) -> str | None:
        inner = _models(field.annotation)
        if name == "kind" and len(typing.get_args(field.annotation)) == 1:
            return None  # it is in the title
        if inner and isinstance(field.default, BaseModel) and field.description is None:
            return None
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        values, default = ("see below", _default_of(field)) if inner else (_values(field), _default(field))
        return f"| `{above}{name}` | {values} | {default} | {meaning} |"

    def _below(self, key: str, field: FieldInfo) -> Iterator[str]:
        models = _models(field.annotation)
        if not models:
            return
        listed = " (each of a list)" if typing.get_origin(_bare(field.annotation)) is tuple else ""
        if len(models) == 1 and models[0] in self._places:
            yield from (f"### `{key}`", "", f"The keys of {self._places[models[0]]}{_otherwise(field)}.", "")
            return
        yield from (f"### `{key}`{listed}", "")
        if len(models) == 1:
            yield from self.section(f"{key}.", models[0])
            return
        if common := _common(models):
            self._places[common] = ""
            rows = [self._row(f"{key}.", name, each) for name, each in common.model_fields.items()]
            yield from _table(filter(None, rows))
        for model in models:
            yield from (f"With `kind: {_tag(model)}`:", "")
            yield from self.section(f"{key}.", model)


def _table(rows: Iterable[str]) -> Iterator[str]:
    yield from ("| key | values | default | |", "|---|---|---|---|", *rows, "")


def _common(models: list[type[BaseModel]]) -> type[BaseModel] | None:
    """What all of them inherit their first keys from."""
    shared = set.intersection(*(set(model.__mro__[1:]) for model in models)) - set(BaseModel.__mro__)
    return next((base for base in models[0].__mro__ if base in shared), None)


def _sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _tag(model: type[BaseModel]) -> str:
    return str(typing.get_args(model.model_fields["kind"].annotation)[0])


def _bare(annotation: Any) -> Any:
    """Without null, and without what pydantic is told beside the type."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in _UNIONS:
        others = [each for each in typing.get_args(annotation) if each is not types.NoneType]
        return _bare(others[0]) if len(others) == 1 else annotation
    return annotation


def _models(annotation: Any) -> list[type[BaseModel]]:
    bare = _bare(annotation)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return [bare]
    if typing.get_origin(bare) in (*_UNIONS, tuple):
        return [model for each in typing.get_args(bare) if each is not Ellipsis for model in _models(each)]
    return []


def _values(field: FieldInfo) -> str:
    """What may be written there."""
    words = ", ".join(_words(field.annotation))
    for bound in field.metadata:
        match bound:
            case annotated_types.Ge(ge=least):
                words += f", {least:g} or more"
            case annotated_types.Gt(gt=least):
                words += f", above {least:g}"
            case annotated_types.Le(le=most):
                words += f", {most:g} or less"
            case annotated_types.Lt(lt=most):
                words += f", below {most:g}"
    may_be_null = types.NoneType in typing.get_args(field.annotation)
    return f"{words}, or `null`" if may_be_null and field.default is not None else words


def _words(annotation: Any) -> list[str]:
    bare = _bare(annotation)
    origin, inner = typing.get_origin(bare), typing.get_args(bare)
    if origin is Literal:
        return [f"`{each}`" for each in inner]
    if origin in _UNIONS:
        return [word for each in inner if each is not types.NoneType for word in _words(each)]
    if origin is tuple:
        of = ", ".join(dict.fromkeys(word for each in inner if each is not Ellipsis for word in _words(each)))
        return [f"list of {of}"]
    return [_WORDS[origin or bare]]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    return f"`{_flow(field.default)}`"


def _default_of(field: FieldInfo) -> str:
    """Of a part with keys of its own."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, tuple):
        return f"`{_flow([each.model_dump(exclude_defaults=True) for each in field.default])}`"
    return "`null`" if field.default is None else "as below"


def _otherwise(field: FieldInfo) -> str:
    default = field.default
    given = default.model_dump(exclude_defaults=True) if isinstance(default, BaseModel) else {}
    return f", by default `{_flow(given)}`" if given else ""


def _flow(value: Any) -> str:
    """As it is written in a recipe, in one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


if __name__ == "__main__":
    print(page(), end="")
