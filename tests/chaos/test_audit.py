"""The audit of a run finds what it is there to find: each count is wrong once here, and is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.ledger import Ledger
from algorithms.slots import Slot
from algorithms.types import Update
from tests.actors.groups import ready
from tests.chaos.audit import Audit, audit

Lines = list[dict[str, Any]]


def train(ledger: Ledger, ordinals: range, step: int) -> None:
    for ordinal in ordinals:
        slot = Slot(ordinal, 0, step)
        ledger.dispatched(slot, replica=0)
        ledger.scored(ready(slot, step).summary)
    ledger.trained([ready(Slot(n, 0, step), step) for n in ordinals], Update(step, step + 1, {}), 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three steps of two groups, which went back to a cut after the second."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (tmp_path / "faults").mkdir()
    path = run / "ledger.jsonl"
    with Ledger(path) as ledger:
        train(ledger, range(0, 2), 0)
        lines = ledger.num_lines
        train(ledger, range(2, 4), 1)
    with Ledger.resume(path, lines, version=1) as ledger:
        train(ledger, range(2, 4), 1)
        train(ledger, range(4, 6), 2)
    (run / "model" / "policy.json").write_text(json.dumps({"trained": [[0, 1], [2, 3], [4, 5]]}))
    (run / "summary.json").write_text("{}")
    return tmp_path


def counts(found: Audit) -> tuple[int, int, int, int]:
    return found.lost, found.duplicated, found.unknown_version_tokens, found.silent_zero_rewards


def test_a_run_that_is_in_order_counts_nothing(folder: Path) -> None:
    found = audit(folder, 2, 3)
    assert counts(found) == (0, 0, 0, 0)
    assert found.notes == ()
    assert (found.groups, found.left_out, found.recovery_steps_max) == (6, 0, 1)


def test_a_row_that_is_no_prompt_is_left_out_and_not_lost(folder: Path) -> None:
    path = folder / "run" / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines += [
        {"event": "quarantined", "ordinal": 6, "t": 9.0, "cause": "too long", "row": 1, "attempt": 0},
        {"event": "dispatched", "ordinal": 7, "t": 9.0, "attempt": 0, "resumed": False, "replica": 0},
        {"event": "filtered", "ordinal": 7, "t": 9.0, "cause": "surplus"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = audit(folder, 2, 3)
    assert counts(found) == (0, 0, 0, 0)
    assert (found.groups, found.left_out) == (6, 2)


def without_a_fate(lines: Lines) -> None:
    del lines[-1]


def twice(lines: Lines) -> None:
    lines.append(lines[-1])


def left_out_twice(lines: Lines) -> None:
    lines += [{"event": "dispatched", "ordinal": 6, "t": 9.0, "attempt": 0, "resumed": False, "replica": 0}]
    lines += [{"event": "filtered", "ordinal": 6, "t": 9.0, "cause": cause} for cause in ("zero_std", "surplus")]


def set_aside_and_filtered(lines: Lines) -> None:
    lines += [
        {"event": "quarantined", "ordinal": 6, "t": 9.0, "cause": "empty", "row": 1, "attempt": 0},
        {"event": "filtered", "ordinal": 6, "t": 9.0, "cause": "surplus"},
    ]


def trained_and_left_out(lines: Lines) -> None:
    lines.append({"event": "filtered", "ordinal": 5, "t": 9.0, "cause": "surplus"})


def of_another_size(lines: Lines) -> None:
    """The last step has taken one more group than the journal says that it takes."""
    lines += [
        {"event": "dispatched", "ordinal": 6, "t": 9.0, "attempt": 0, "resumed": False, "replica": 0},
        {"event": "trained", "ordinal": 6, "t": 9.0, "step": 2, "version": 3},
    ]


def skipped(lines: Lines) -> None:
    for line in lines:
        if line["ordinal"] == 5:
            line["ordinal"] = 7


def of_the_future(lines: Lines) -> None:
    scored = next(line for line in reversed(lines) if line["event"] == "scored")
    scored["tokens_by_version"] = {"9": 4}


@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (without_a_fate, 0),
        (skipped, 0),
        (of_another_size, 0),
        (twice, 1),
        (left_out_twice, 1),
        (set_aside_and_filtered, 1),
        (trained_and_left_out, 1),
        (of_the_future, 2),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_journal_that_is_not_in_order_is_found(
    spoil: Callable[[Lines], None], place: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "run" / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    spoil(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert counts(audit(folder, 2, 3))[place] > 0


@pytest.mark.parametrize(
    ("trained", "place"), [([[0, 1], [2, 3], [4]], 0), ([[0, 1], [2, 3], [4, 5, 1]], 1), ([[0, 1], [2, 3], [4, 6]], 1)]
)
def test_a_policy_that_has_trained_something_else_is_found(trained: Any, place: int, folder: Path) -> None:
    (folder / "run" / "model" / "policy.json").write_text(json.dumps({"trained": trained}))
    assert counts(audit(folder, 2, 3))[place] > 0


def test_what_the_policy_has_reported_is_counted(folder: Path) -> None:
    (folder / "faults" / "findings.txt").write_text("tokens 3 step 1\nreward 1 step 2: 0.0 where 4.0 was given\n")
    assert counts(audit(folder, 2, 3)) == (0, 0, 3, 1)
