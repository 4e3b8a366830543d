"""The status verb: the runs of a cluster in one table, one row for each, or each attempt of one."""

import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from deploy.jobs.attempts import Attempt, of_run
from deploy.jobs.head import Head, HeadError
from deploy.jobs.progress import from_folder, from_log, seen

_WIDE = 200
_COLUMNS = "run", "attempt", "state", "since", "for", "step", "exit code"


def status(head: Head, run: str | None, console: Console) -> None:
    """Print the table; ValueError when the cluster has no such run."""
    attempts = head.attempts()
    rows = latest(attempts) if run is None else known(run, attempts)
    if not rows:
        console.print(f"no runs at {head.address}")
        return
    if not console.is_terminal:
        console.width = _WIDE  # for programs that read it line by line
    table = Table(*_COLUMNS)
    newest = {each.job for each in latest(attempts)}
    for each in rows:
        table.add_row(*row(each, _step(head, each) if each.job in newest else "", time.time()))
    console.print(table)


def latest(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The newest attempt of every run that was submitted by us, the newest run last."""
    newest: dict[str, Attempt] = {}
    for each in attempts:
        if each.ours and (each.run not in newest or newest[each.run].number < each.number):
            newest[each.run] = each
    return sorted(newest.values(), key=lambda each: each.began_s or 0.0)


def known(run: str, attempts: Iterable[Attempt]) -> list[Attempt]:
    """The attempts of a run, the oldest first; ValueError when there are none."""
    all_attempts = list(attempts)
    if mine := of_run(run, all_attempts):
        return mine
    names = sorted({each.run for each in all_attempts if each.ours})
    raise ValueError(f"{run}: this cluster has no such run; it has {', '.join(names) or 'none'}")


def row(attempt: Attempt, step: str, now_s: float) -> Sequence[str]:
    """What the table says of an attempt."""
    code = attempt.exit_code
    began, ended = attempt.began_s, attempt.ended_s
    since = "" if began is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
    lasted = "" if began is None else duration(max(0.0, (ended or now_s) - began))
    exited = "" if code is None else str(code)
    return attempt.run, str(attempt.number), attempt.state.lower(), since, lasted, step, exited


def duration(seconds: float) -> str:
    """As `3 d 4 h`, `2 h 5 min`, `4 min 3 s` or `7 s`."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    whole = int(seconds)
    parts: list[str] = []
    for unit, size in units:
        count, whole = divmod(whole, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def _step(head: Head, attempt: Attempt) -> str:
    """How far a run is, where that can be told."""
    folder = seen(attempt.run_dir)
    if folder is not None and (found := from_folder(folder)) is not None:
        return found  # a run says less often how far it is
    try:
        return from_log(head.log(attempt.job), attempt.run) or ""
    except HeadError:
        return ""
