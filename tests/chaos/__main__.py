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
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.chaos.audit import audit
from tests.chaos.belongings import left_behind
from tests.chaos.disk import forget
from tests.chaos.life import preload
from tests.chaos.plan import plan
from tests.chaos.result import NOT_FAULTS, Result, table
from tests.chaos.run import GROUPS_PER_BATCH, ChaosRun
from tests.chaos.state import State, code_id

_END_S = 75.0
"""Ray's own processes take their time to end after the driver was killed."""
_STEPS_PER_FAULT = 4
_FAULTS_PER_RUN = {"light": 60, "vllm": 8}
_MAX_RUNS = 6


@dataclass(frozen=True, slots=True)
class Batch:
    """Faults that strike in runs of one kind."""

    engine: str
    faults: int
    seed: int


@dataclass(frozen=True, slots=True)
class How:
    """What all batches have in common."""

    restarts: float
    """Share of the faults that end the driver."""
    only: str
    """Classes with this in their name."""
    deadline: float
    """No fault strikes after this time.monotonic() moment, and no batch of a campaign that can go on begins."""
    work: Path
    """Folder for the runs; those in which all was well are removed."""
    console: Console
    colocated: bool = False
    """The replicas lie with the policy, and rest while it steps."""


def inject(batch: Batch, how: How) -> Result:
    """Runs until all faults of a batch have struck."""
    restarts, vllm = round(how.restarts * batch.faults), batch.engine == "vllm"
    names = plan(batch.faults, batch.seed, restarts=restarts, vllm=vllm, only=how.only, colocated=how.colocated)
    result, console, started = Result(), how.console, time.monotonic()
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
            share = min(len(names), _FAULTS_PER_RUN[batch.engine])
            folder = how.work / f"run-{batch.engine}-{batch.seed}-{number}"
            left_behind(folder / "faults", (), (), timeout_s=0.0)  # of a campaign that was killed here
            shutil.rmtree(folder, ignore_errors=True)
            steps = _STEPS_PER_FAULT * share + 6
            seed, first = batch.seed + number, names[:share]
            run = ChaosRun(batch.engine, folder, seed, steps, first, tick, how.deadline, how.colocated)
            run.drive()
            run.finish()
            names = run.names + names[share:]
            number += 1
            _account(run, result)
    result.seconds = time.monotonic() - started
    return result


def _account(run: ChaosRun, result: Result) -> None:
    left = run.leaked(_END_S)
    result.outcomes += run.outcomes
    result.lives += len(run.lives)
    result.resumed += len(run.lives) - 1
    result.hangs += run.hangs
    result.untyped_exits += len(run.untyped)
    result.leaked += len(left)
    result.notes += [*run.notes, *run.untyped, *(f"left behind: {what}" for what in left)]
    if not run.complete:
        result.lost += 1
        return
    with contextlib.redirect_stdout(io.StringIO()):
        found = audit(run.folder, GROUPS_PER_BATCH, run.steps)
    result.add(found)
    if not (found.notes or run.untyped or run.hangs or left):
        forget(run.folder)


def batches(num_faults: int, num_vllm: int, seed: int) -> list[Batch]:
    """Equal shares, each with a seed of its own, so that a long campaign can be gone on with."""
    made: list[Batch] = []
    for engine, total in (("vllm", num_vllm), ("light", num_faults - num_vllm)):
        while total > 0:
            share = min(total, _FAULTS_PER_RUN[engine])
            made.append(Batch(engine, share, seed + 1000 * len(made)))
            total -= share
    return made


def campaign(todo: list[Batch], how: How, state: State | None) -> Result:
    """All batches that are not done yet, and what those that are have come to."""
    whole = Result()
    for index, batch in enumerate(todo):
        name = f"{batch.engine} {batch.faults} {batch.seed} {how.restarts:g} {how.only}{' colocated' * how.colocated}"
        result = None if state is None else state.done(name)
        if result is None:
            if state is not None and time.monotonic() > how.deadline:
                continue
            where = f"batch {index + 1} of {len(todo)}"
            how.console.print(f"{where}: {batch.faults} faults, {batch.engine} engine", highlight=False)
            if state is None:
                result = inject(batch, how)
            else:
                result = inject(batch, replace(how, deadline=math.inf))  # a batch is whole, or not noted
                if len(result.outcomes) >= batch.faults:
                    state.note(name, result)
        whole.merge(result)
    return whole


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=60, help="how many [60]")
    parser.add_argument("--vllm", type=int, default=0, help="so many of them with real engines and a real policy [0]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=float, default=0.26, help="share of faults that end the driver [0.26]")
    parser.add_argument("--colocated", action="store_true", help="the replicas lie with the policy")
    parser.add_argument("--only", default="", help="classes with this in their name [all]")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="nothing new begins after so long: with --state no batch, "
        "else no fault [no limit]"
    )  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder for the runs [a temporary one]; those that failed stay there")
    parser.add_argument("--state", type=Path, help="what is done is noted here, and not done again by the same code")
    given = parser.parse_args(arguments)
    try:
        state = None if given.state is None else State(given.state, code_id())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    preload()
    console = Console()
    work = given.work.absolute() if given.work else Path(tempfile.mkdtemp(prefix="chaos-"))
    deadline = time.monotonic() + given.seconds
    todo = batches(given.faults, given.vllm, given.seed)
    result = campaign(todo, How(given.restarts, given.only, deadline, work, console, given.colocated), state)
    console.print(table(result.outcomes))
    for note in result.notes[:40]:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{result.groups} groups trained, {result.left_out} left out; {result.lives} lives of the driver, "
        f"{result.resumed} of them begun again after the driver was killed or told to stop, its disk was full or its "
        f"raylet was lost; {result.seconds:.0f} s; runs: {work}",
        highlight=False,
        soft_wrap=True,
    )
    print(json.dumps(result.to_json()), flush=True)
    if len(result.outcomes) < given.faults and given.seconds == math.inf:
        print(f"error: {len(result.outcomes)} of {given.faults} faults struck", file=sys.stderr)
        sys.exit(1)
    return result.to_json()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so the run under way is ended, too
    counts = main()
    sys.exit(any(value for name, value in counts.items() if name not in NOT_FAULTS))
