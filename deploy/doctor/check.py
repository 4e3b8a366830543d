"""A check ends by its deadline with one finding, whatever goes wrong in it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from actors.deadline import DeadlineError, aside, within
from actors.errors import RunError, last_line

Level = Literal["skip", "pass", "warn", "fail"]
LEVELS: tuple[Level, ...] = ("skip", "pass", "warn", "fail")
"""The ones that matter more behind."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, and what to do about it."""

    level: Level
    text: str
    fix: str = ""

    @property
    def line(self) -> str:
        return " ".join(f"{self.text}; {self.fix}".split()) if self.fix else " ".join(self.text.split())


@dataclass(frozen=True, slots=True)
class Check:
    """One question, and how long it may take to answer it."""

    name: str
    deadline_s: float
    look: Callable[[], Finding]


def passed(text: str) -> Finding:
    return Finding("pass", text)


def warned(text: str, fix: str) -> Finding:
    return Finding("warn", text, fix)


def failed(text: str, fix: str) -> Finding:
    return Finding("fail", text, fix)


def skipped(text: str) -> Finding:
    return Finding("skip", text)


def found_by(check: Check) -> Finding:
    """The check's finding; what it raises, and that it is late, are failures of what it looked at."""
    try:
        return asyncio.run(within(check.deadline_s, aside(check.look), f"the check '{check.name}'"))
    except DeadlineError as error:
        return failed(str(error), "see whether what it looks at hangs, or give the command again on a quieter machine")
    except (ValueError, RunError) as error:
        return Finding("fail", str(error))  # these say what to do
    except Exception as error:  # noqa: BLE001 - whatever a check stumbles over, the others are made
        return Finding("fail", f"{type(error).__name__}: {last_line(error)}")
