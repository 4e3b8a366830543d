"""The ledger verb: from the journal alone, every ordinal has one fate, and this is what was sampled in vain."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actors.fates import Fates
from actors.journal import fates, read
from actors.run.folder import RunFolder


def show(run_dir: Path) -> bool:
    """Print fates and waste; whether the journal is consistent, and complete if the run is finished."""
    folder = RunFolder(run_dir)
    if not folder.ledger.is_file():
        raise ValueError(f"{run_dir}: holds no ledger.jsonl; give the folder of a run, such as runs/demo")
    found = fates(read(folder.ledger))
    problems = list(found.problems())
    if folder.finished:
        problems += [f"ordinal {ordinal} has no fate, and the run is finished" for ordinal in sorted(found.lost())]
        problems += [f"ordinal {ordinal} was passed over: it was never dispatched" for ordinal in found.passed_over()]
    console = Console()
    console.print(_fates(found), _waste(found))
    if found.quarantined:
        console.print(_quarantined(found))
    for problem in problems[:20]:
        console.print(f"wrong: {problem}", highlight=False, soft_wrap=True, markup=False)
    if len(problems) > 20:
        console.print(f"and {len(problems) - 20} more")
    console.print("the journal is NOT consistent" if problems else _verdict(found), highlight=False, soft_wrap=True)
    return not problems


def _fates(found: Fates) -> Table:
    table = Table("fate", "groups", title="What became of every prompt group")
    counts = Counter({"trained": len(found.trained)}) + Counter(causes[0] for causes in found.left_out.values())
    counts["open"] = len(found.lost())
    for fate, count in counts.most_common():
        table.add_row(fate, str(count))
    return table


def _waste(found: Fates) -> Table:
    table = Table("cause", "attempts", "tokens", "seconds", title="What was sampled in vain")
    for cause, waste in sorted(found.waste.items()):
        table.add_row(escape(cause), str(waste.attempts), str(waste.tokens), f"{waste.seconds:.1f}")
    return table


def _quarantined(found: Fates) -> Table:
    table = Table("row", "group", "cause", title="What was set aside")
    for ordinal, quarantined in sorted(found.quarantined.items(), key=lambda item: (item[1].row, item[0])):
        cause = quarantined.cause.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate has no bytes
        table.add_row(str(quarantined.row), str(ordinal), escape(cause))
    return table


def _verdict(found: Fates) -> str:
    steps = len(found.by_step) + len(found.skipped)
    skipped = f" ({len(found.skipped)} skipped)" if found.skipped else ""
    return (
        f"{len(found.dispatched)} ordinals, {steps} step{'s' * (steps != 1)}{skipped}, {found.num_cuts} resumed: each "
        "ordinal was trained once, or left out for one cause, or is open"
    )
