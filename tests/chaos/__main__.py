"""Faults are injected into real runs, and what they cost is counted: `python -m tests.chaos --faults 60 --seed 0`.

The last line is one JSON object; all of its counts but `faults`, `classes` and `recovery_steps_max` must be 0.
"""

import argparse
import contextlib
import io
import json
import math
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.chaos.audit import Audit, audit
from tests.chaos.life import preload
from tests.chaos.plan import plan
from tests.chaos.run import GROUPS_PER_BATCH, ChaosRun, Outcome, forget, leaked, shared_memory

_END_S = 40.0
"""Ray's own processes take their time to end after the driver was killed."""
_STEPS_PER_FAULT = 4
_FAULTS_PER_RUN = 60
_MAX_RUNS = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """Faults that strike in runs of one kind."""

    engine: str
    faults: int
    seed: int


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

    def merge(self, other: Self) -> None:
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            setattr(self, part.name, max(mine, theirs) if part.name == "recovery_steps_max" else mine + theirs)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**values | {"outcomes": [Outcome(**outcome) for outcome in values["outcomes"]]})

    def to_json(self) -> dict[str, int]:
        names = (
            "lost", "duplicated", "hangs", "unknown_version_tokens", "silent_zero_rewards", "untyped_exits", "leaked",
            "recovery_steps_max",
        )  # fmt: skip
        classes = {outcome.name for outcome in self.outcomes}
        return {"faults": len(self.outcomes), "classes": len(classes)} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class How:
    """What all batches have in common."""

    restarts: float
    """Share of the faults that end the driver."""
    only: str
    """Classes with this in their name."""
    deadline: float
    """No fault strikes after this time.monotonic() moment."""
    work: Path
    """Folder for the runs; those in which all was well are removed."""
    console: Console


def inject(batch: Batch, how: How) -> Result:
    """Runs until all faults of a batch have struck."""
    restarts, vllm = round(how.restarts * batch.faults), batch.engine == "vllm"
    names = plan(batch.faults, batch.seed, restarts=restarts, vllm=vllm, only=how.only)
    result, console = Result(), how.console
    memory = shared_memory()
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("faults", total=batch.faults)

        def tick(name: str) -> None:
            bar.update(task, advance=1, description=f"{name:<36}")
            if not console.is_terminal:
                print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)

        number = 0
        while names and number < _MAX_RUNS + batch.faults // 10:
            share = min(len(names), _FAULTS_PER_RUN)
            folder = how.work / f"run-{batch.seed}-{number}"
            shutil.rmtree(folder, ignore_errors=True)  # of a campaign that was stopped here
            steps = _STEPS_PER_FAULT * share + 6
            run = ChaosRun(batch.engine, folder, batch.seed + number, steps, names[:share], tick, how.deadline)
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


def batches(num_faults: int, num_vllm: int, seed: int) -> list[Batch]:
    """Equal shares, each with a seed of its own, so that a long campaign can be gone on with."""
    made: list[Batch] = []
    for engine, total in (("light", num_faults - num_vllm), ("vllm", num_vllm)):
        while total > 0:
            share = min(total, _FAULTS_PER_RUN)
            made.append(Batch(engine, share, seed + 1000 * len(made)))
            total -= share
    return made


def campaign(todo: list[Batch], how: How, state: Path | None) -> Result:
    """All batches that the state file does not hold yet, and what those that it holds have come to."""
    done: dict[str, dict[str, Any]] = {}
    if state is not None and state.exists():
        done = {line["batch"]: line["result"] for line in map(json.loads, state.read_text().splitlines())}
    whole = Result()
    for index, batch in enumerate(todo):
        name = f"{batch.engine} {batch.faults} {batch.seed} {how.restarts:g} {how.only}"
        if name in done:
            whole.merge(Result.from_dict(done[name]))
            continue
        where = f"batch {index + 1} of {len(todo)}"
        how.console.print(f"{where}: {batch.faults} faults, {batch.engine} engine", highlight=False)
        result = inject(batch, how)
        whole.merge(result)
        if state is not None and time.monotonic() < how.deadline:
            state.parent.mkdir(parents=True, exist_ok=True)
            with state.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"batch": name, "result": asdict(result)}) + "\n")
    return whole


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=60, help="how many [60]")
    parser.add_argument("--vllm", type=int, default=0, help="so many of them with real engines and a real policy [0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=float, default=0.22, help="share of faults that end the driver [0.22]")
    parser.add_argument("--only", default="", help="classes with this in their name [all]")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no fault strikes after so long [no limit]")
    parser.add_argument("--work", type=Path, help="folder for the runs [a temporary one]; those that failed stay there")
    parser.add_argument("--state", type=Path, help="what is done is noted here, and not done again")
    given = parser.parse_args(arguments)
    preload()
    console = Console()
    work = given.work or Path(tempfile.mkdtemp(prefix="chaos-"))
    started = time.monotonic()
    how = How(given.restarts, given.only, started + given.seconds, work, console)
    todo = batches(given.faults, given.vllm, given.seed)
    result = campaign(todo, how, given.state)
    console.print(table(result.outcomes))
    for note in result.notes[:40]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    seconds = time.monotonic() - started
    console.print(
        f"{result.groups} groups, {result.lives} lives of the driver, {seconds:.0f} s; runs: {work}",
        highlight=False,
        soft_wrap=True,
    )
    print(json.dumps(result.to_json()), flush=True)
    return result.to_json()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the run under way is ended, too
    counts = main()
    good = {"faults", "classes", "recovery_steps_max"}
    sys.exit(any(value for name, value in counts.items() if name not in good))
