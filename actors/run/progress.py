"""What one wants to see while a run goes on: a live bar on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 5.0  # between two lines where there is no terminal


class RunConsole(Console):
    """Where a run prints; when nobody reads the pipe any more, it goes on all the same, and prints no more."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):  # by which rich would end the process
            super().on_broken_pipe()


class RunProgress:
    """Steps done, and a few figures beside them."""

    def __init__(self, title: str, num_steps: int, console: Console | None = None) -> None:
        self._console = console or RunConsole()
        self._title = title
        self._num_steps = num_steps
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_steps, figures="")
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line that stays. A lone surrogate, as a reward function may find in what a model has written, is in it
        as its escape: it has no bytes."""
        shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
        self._console.print(shown, highlight=False, soft_wrap=True, markup=False)

    def step(self, done: int, figures: Mapping[str, str]) -> None:
        """`done` steps are complete; `figures` are shown as they are."""
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        self._bar.update(self._task, completed=done, figures=text)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= _LINE_EVERY_S or done == self._num_steps):
            self._last_line = now
            self.say(f"{self._title}  {done}/{self._num_steps}  {text}")
