"""The doctor verb: a line for each check as it ends, and whether a run would go well."""

import contextlib
from collections import Counter
from collections.abc import Sequence

from datasets import disable_progress_bars
from rich.console import Console
from rich.text import Text

from actors.recipe.schema import Recipe
from deploy.doctor.check import LEVELS, Check, Finding, found_by, passed
from deploy.doctor.examination import Examination

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
_CLOSE_S = 90.0
_WIDTH = len("shared storage") + 1


def show(recipes: Sequence[Recipe], address: str | None, deep: bool) -> bool:
    """Make every check and print its line; whether nothing failed. `recipes`: in the order in which they would run."""
    disable_progress_bars()  # one for each file that is read would stand between our lines
    console = Console(soft_wrap=True, highlight=False)
    width = _WIDTH + (max(len(recipe.name) + 2 for recipe in recipes) if len(recipes) > 1 else 0)
    counts: Counter[str] = Counter()
    session = contextlib.ExitStack()
    try:
        for check in Examination(recipes, address, deep, session).checks():
            finding = found_by(check)
            counts[finding.level] += 1
            console.print(line(check.name, width, finding))
    finally:
        ended = found_by(Check("the end of Ray", _CLOSE_S, lambda: _closed(session)))
    if ended.level == "fail":
        console.print(line("ray", width, ended))
    console.print(", ".join(f"{counts[level]} {level}" for level in reversed(LEVELS)))
    return counts["fail"] == 0


def line(name: str, width: int, finding: Finding) -> Text:
    """One line, whatever the terminal's width."""
    return Text.assemble((finding.level, _STYLES[finding.level]), f"  {name:<{width}} {finding.line}")


def _closed(session: contextlib.ExitStack) -> Finding:
    session.close()
    return passed("")
