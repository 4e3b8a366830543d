"""Plain data only: strings, numbers, true and false, null, lists, and mappings whose keys are distinct strings.

Scalars are read as YAML 1.2 reads them, where PyYAML would read YAML 1.1: `1e-3` is a number; `on`, `no` and dates are
strings. Both sides live here because what is written must be read back equal.
"""

import json
import re
from typing import Any, NoReturn

import yaml

INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$")

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class PlainYamlError(ValueError):
    """The text is no plain YAML; `line` is where, counted from 1, if that is known."""

    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


def parse(text: str) -> Any:
    """The one value that the text holds; aliases are copied, so that changing one place changes no other."""
    try:
        return json.loads(json.dumps(yaml.load(text, _Loader), allow_nan=False))
    except PlainYamlError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f"{error.context}, " if error.context else ""
        raise PlainYamlError(f"invalid YAML: {context}{error.problem}", mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # unreadable characters; 1e999; an alias in itself
        raise PlainYamlError(f"invalid YAML: {' '.join(str(error).split())}", None) from None


def write(tree: Any) -> str:
    """The text that `parse` reads back as the same tree, its keys in the order of the tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    """The safe loader without YAML 1.1's scalars and without types beyond plain data."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol
    yaml_constructors = {  # noqa: RUF012
        tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _PLAIN
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Keys are checked here because PyYAML keeps the last of two equal keys without a word."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                _refuse(f"the key {key.value!r} is not a string; put it in quotes", line)
            if key.value in first:
                _refuse(f"duplicate key {key.value!r}, first on line {first[key.value]}; keep one of them", line)
            first[key.value] = line
        return node


def _refuse(problem: str, line: int) -> NoReturn:
    raise PlainYamlError(problem, line)


for _name, _pattern, _first in (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:[tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF")),
    ("int", INT, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that our loader, or any YAML 1.1 loader, would take for something else; knows no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(f"{_TAG}float", FLOAT, list("-+.0123456789"))
