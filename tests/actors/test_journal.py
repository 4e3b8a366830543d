"""From the journal alone it is known what became of every ordinal, wherever the process was killed."""

from pathlib import Path

import pytest

from actors import journal
from actors.ledger import Ledger
from algorithms.slots import Slot
from algorithms.types import Update
from tests.actors.groups import ready


def write(ledger: Ledger, ordinals: range, step: int | None) -> None:
    """The ordinals are sampled and, at a step, trained."""
    for ordinal in ordinals:
        slot = Slot(ordinal, 0, 0)
        ledger.dispatched(slot, replica=0)
        ledger.scored(ready(slot, 0).summary)
    if step is not None:
        ledger.trained([ready(Slot(n, 0, 0), 0) for n in ordinals], Update(step, step + 1, {}), 0)


def test_a_run_that_goes_back_trains_nothing_twice(tmp_path: Path) -> None:
    """Two steps, a cut after the first, a crash in the third; the second is taken again."""
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        write(ledger, range(4), step=0)
        lines = ledger.num_lines
        write(ledger, range(4, 8), step=1)
        write(ledger, range(8, 10), step=None)
    with path.open("ab") as file:
        file.write(b'{"event": "disp')  # torn by the crash
    with Ledger.resume(path, lines, version=1) as ledger:
        assert ledger.lost() == set()
        write(ledger, range(4, 8), step=1)
        assert (ledger.num_trained, ledger.num_duplicated, ledger.num_cuts) == (8, 0, 1)
        in_memory = ledger.waste
    found = journal.fates(journal.read(path))
    assert list(found.problems()) == []
    assert found.trained == dict.fromkeys(range(8), 1)
    assert found.waste == in_memory
    assert found.waste["rolled back"].attempts == 6, "four of step 1 and two that had not been trained"


def test_how_often_the_run_was_rolled_back_is_known_to_every_process_that_goes_on(tmp_path: Path) -> None:
    """From the decision on, whatever the cut is: what comes after it is taken back, but not that it was."""
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        write(ledger, range(4), step=0)
        lines = ledger.num_lines
    for rolls_back, expected in ((True, 1), (False, 1), (True, 2)):
        with Ledger.resume(path, lines, version=1) as ledger:
            write(ledger, range(4, 8), step=1)
            if rolls_back:
                ledger.rolled_back("entropy was 0")
                assert journal.fates(journal.read(path)).num_roll_backs == expected, "the process may die now"
            assert ledger.num_roll_backs == expected
    with Ledger.resume(path, lines, version=1) as ledger:
        assert (ledger.num_roll_backs, ledger.num_cuts) == (2, 4)
    assert list(journal.fates(journal.read(path)).problems()) == []


def test_a_crash_at_any_byte_leaves_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        write(ledger, range(2), step=0)
        write(ledger, range(2, 4), step=1)
    whole = path.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        journal.mend(cut)
        events = journal.read(cut)
        assert len(events) == whole[:size].count(b"\n")
        list(journal.fates(events).problems())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda lines: [*lines, lines[-1]], "ordinal 3 was trained 2 times"),
        (lambda lines: lines[1:], "ordinal 0 has a fate and was never dispatched"),
        (lambda lines: lines[:-1], "steps have trained 1, 2 groups"),
    ],
)
def test_what_must_not_be_is_named(tmp_path: Path, change, problem: str) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        write(ledger, range(2), step=0)
        write(ledger, range(2, 4), step=1)
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    assert any(problem in found for found in journal.fates(journal.read(path)).problems())


def test_what_is_taken_back_takes_its_fates_and_its_size_with_it(tmp_path: Path) -> None:
    """An ordinal that was left out before and after a cut was left out once, and a life that left nothing has no
    size."""
    path = tmp_path / "ledger.jsonl"
    with Ledger.begin(path, groups_per_batch=4) as ledger:
        write(ledger, range(4), step=0)
        write(ledger, range(4, 6), step=None)
        lines = ledger.num_lines
        ledger.unneeded([4])
    with Ledger.resume(path, lines, version=1, groups_per_batch=3) as ledger:
        ledger.unneeded([4])
        write(ledger, range(6, 8), step=None)
    with Ledger.resume(path, lines, version=1, groups_per_batch=2) as ledger:
        ledger.unneeded([4])
        write(ledger, range(6, 8), step=1)
        assert ledger.num_duplicated == 0
    found = journal.fates(journal.read(path))
    assert list(found.problems()) == []
    assert found.left_out == {4: ["surplus"]}
    assert [stretch.groups_per_batch for stretch in found.stretches] == [None, 4, 2]
    with Ledger.resume(path, ledger.num_lines, version=2, groups_per_batch=2) as ledger:
        ledger.unneeded([4])
        assert ledger.num_duplicated == 1


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for line in ("hello", "[" * 100_000, "[1]"):
        path.write_text('{"event": "late", "ordinal": 1, "t": 0}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2 is not an event"):
            journal.read(path)


def test_a_journal_that_lacks_what_a_cut_counts_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(ValueError, match=r"ledger\.jsonl: is gone"):
        journal.check(path, 8)
    with Ledger(path) as ledger:
        write(ledger, range(4), step=None)
    journal.check(path, 8)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="lines where the checkpoint counts on 8"):
        journal.check(path, 8)


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "trained", "ordinal": 1, "t": 0}',
        '{"event": "sung", "ordinal": 1, "t": 0}',
        '{"event": "began", "ordinal": -1, "t": 0}\n{"event": "resumed", "ordinal": -1, "t": 0}',
        '{"event": "began", "ordinal": -1, "t": 0}\n{"event": "resumed", "ordinal": -1, "t": 0, "lines": "x"}',
        '{"event": "quarantined", "ordinal": 1, "t": 0, "cause": "", "row": "x"}',
        '{"event": "quarantined", "ordinal": 1, "t": 0, "cause": "", "row": 1e999}',
    ],
)
def test_an_event_of_no_journal_is_told(line: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"ledger\.jsonl: .*--overwrite"):
        journal.check(tmp_path / "ledger.jsonl", 1)


@pytest.mark.parametrize("ordinal", ['"1"', "1.5", "true", "null"])
def test_an_ordinal_is_a_whole_number(ordinal: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(f'{{"event": "began", "ordinal": {ordinal}, "t": 0}}\n')
    with pytest.raises(ValueError, match="line 1 is not an event of a journal"):
        journal.read(tmp_path / "ledger.jsonl")
