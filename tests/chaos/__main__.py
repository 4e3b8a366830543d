"""Faults are injected into real runs, and what they cost is counted: `python -m tests.chaos --faults 60 --seed 0`.

The last line is one JSON object; all of its counts but `faults`, `classes` and `recovery_steps_max` must be 0.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.chaos.audit import Audit, audit
from tests.chaos.life import preload
from tests.chaos.plan import plan
from tests.chaos.run import GROUPS_PER_BATCH, ChaosRun, Outcome, forget, leaked, shared_memory

_END_S = 40.0
"""Ray's own processes take their time to end after the driver was killed."""
_STEPS_PER_FAULT = 3
_FAULTS_PER_RUN = 60
_MAX_RUNS = 6


@dataclass(slots=True)
class Result:
    """What all runs together have come to."""

    outcomes: list[Outcome] = field(default_factory=list)
    lost: int = 0
    duplicated: int = 0
    hangs: int = 0
    unknown_version_tokens: int = 0
    silent_zero_rewards: int = 0
    untyped_exits: int = 0
    leaked: int = 0
    recovery_steps_max: int = 0
    groups: int = 0
    lives: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, found: Audit) -> None:
        self.groups += found.groups
        self.lost += found.lost
        self.duplicated += found.duplicated
        self.unknown_version_tokens += found.unknown_version_tokens
        self.silent_zero_rewards += found.silent_zero_rewards
        self.recovery_steps_max = max(self.recovery_steps_max, found.recovery_steps_max)
        self.notes += found.notes

    def to_json(self) -> dict[str, int]:
        names = (
            "lost", "duplicated", "hangs", "unknown_version_tokens", "silent_zero_rewards", "untyped_exits", "leaked",
            "recovery_steps_max",
        )  # fmt: skip
        classes = {outcome.name for outcome in self.outcomes}
        return {"faults": len(self.outcomes), "classes": len(classes)} | {name: getattr(self, name) for name in names}


def inject(num_faults: int, seed: int, engine: str, restarts: int, work: Path, console: Console) -> Result:
    """Runs until all faults have struck; folders of runs in which all was well are removed."""
    names = plan(num_faults, seed, restarts=restarts, vllm=engine == "vllm")
    result = Result()
    memory = shared_memory()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("faults", total=num_faults)

        def tick(name: str) -> None:
            bar.update(task, advance=1, description=f"{name:<36}")
            if not console.is_terminal:
                print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)

        number = 0
        while names and number < _MAX_RUNS + num_faults // 10:
            share = min(len(names), _FAULTS_PER_RUN)
            folder = work / f"run-{seed}-{number}"
            run = ChaosRun(engine, folder, seed + number, _STEPS_PER_FAULT * share + 6, names[:share], tick)
            run.drive()
            run.finish()
            names = run.names + names[share:]
            number += 1
            _account(run, result)
    memory = {name for name in shared_memory() - memory if "plasma" in name or "psm" in name}
    result.leaked += len(memory)
    return result


def _account(run: ChaosRun, result: Result) -> None:
    left = leaked(run.lives, _END_S)
    result.outcomes += run.outcomes
    result.lives += len(run.lives)
    result.hangs += run.hangs
    result.untyped_exits += len(run.untyped)
    result.leaked += len(left)
    result.notes += [*run.notes, *run.untyped, *(f"left behind: {process}" for process in left)]
    if not run.complete:
        result.lost += 1
        return
    with contextlib.redirect_stdout(io.StringIO()):
        found = audit(run.folder, GROUPS_PER_BATCH, run.steps)
    result.add(found)
    if not (found.notes or run.untyped or run.hangs or left):
        forget(run.folder)


def table(outcomes: list[Outcome]) -> Table:
    made = Table("class", "faults", "survived", "longest (s)", title="Faults")
    for name, count in sorted(Counter(outcome.name for outcome in outcomes).items()):
        mine = [outcome for outcome in outcomes if outcome.name == name]
        longest = max(outcome.seconds for outcome in mine)
        made.add_row(name, str(count), str(sum(outcome.survived for outcome in mine)), f"{longest:.1f}")
    return made


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("light", "vllm"), default="light")
    parser.add_argument("--restarts", type=int, help="faults that end the driver [a fifth]")
    parser.add_argument("--work", type=Path, help="folder for the runs [a temporary one]")
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("RAY_ADDRESS", None)
    preload()
    console = Console()
    restarts = given.faults // 5 if given.restarts is None else given.restarts
    work = given.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    started = time.monotonic()
    result = inject(given.faults, given.seed, given.engine, restarts, work, console)
    console.print(table(result.outcomes))
    for note in result.notes[:40]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{result.groups} groups, {result.lives} lives, {time.monotonic() - started:.0f} s", highlight=False)
    print(json.dumps(result.to_json()), flush=True)
    return result.to_json()


if __name__ == "__main__":
    counts = main()
    good = {"faults", "classes", "recovery_steps_max"}
    sys.exit(any(value for name, value in counts.items() if name not in good))
