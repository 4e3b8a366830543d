"""The ledger knows one fate for every ordinal, in memory and in the file."""

import json
from pathlib import Path
from typing import Any

from actors.ledger import Ledger
from actors.pacer import ReadyGroup
from algorithms.slots import Slot
from algorithms.types import Update
from tests.actors.groups import ready


def trained(ledger: Ledger, groups: list[ReadyGroup], step: int) -> None:
    ledger.trained(groups, Update(step, step + 1, {}), oldest_version=0)


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_fate_is_written_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    first, second, third = (Slot(ordinal, 0, 0) for ordinal in range(3))
    for slot in (first, second, third):
        ledger.dispatched(slot, replica=0)
    ledger.scored(ready(first, 0).summary)
    ledger.failed(second, "the engine is gone")
    again = Slot(1, 1, 0)
    ledger.dispatched(again, replica=1)
    ledger.late(second, 4)
    ledger.quarantined(third, "too long", row=7)
    assert ledger.lost() == {0, 1}
    trained(ledger, [ready(first, 0), ready(again, 0)], step=0)
    assert ledger.lost() == set()
    assert (ledger.num_trained, ledger.num_duplicated, ledger.num_quarantined) == (2, 0, 1)
    assert (ledger.num_redispatched, ledger.num_late) == (1, 1)
    with ledger:
        pass  # leaving it closes the file
    fates = [
        (event["event"], event["ordinal"]) for event in events(path) if event["event"] in ("trained", "quarantined")
    ]
    assert fates == [("quarantined", 2), ("trained", 0), ("trained", 1)]


def test_training_twice_is_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    slot = Slot(0, 0, 0)
    ledger.dispatched(slot, replica=0)
    for step in range(2):
        trained(ledger, [ready(slot, 0)], step)
    assert ledger.num_duplicated == 1


def test_waste_is_counted_by_cause(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    slots = [Slot(ordinal, 0, 0) for ordinal in range(4)]
    for slot in slots:
        ledger.dispatched(slot, replica=0)
    ledger.requeued(slots[0], (3, 4), (), seconds=2.0)
    ledger.filtered(ready(slots[1], 0).summary, "zero_std")
    ledger.stopped(slots[2], 5, seconds=1.0)
    ledger.unneeded([2])
    ledger.trained([ready(slots[3], 0)], Update(9, 10, {}), oldest_version=1)
    assert {cause: waste.tokens for cause, waste in ledger.waste.items()} == {
        "requeued": 7, "zero_std": 4, "surplus": 5, "masked": 4,
    }  # fmt: skip
    assert ledger.waste["requeued"].seconds == 2.0
    assert ledger.lost() == {0}, "a requeued prompt has no fate yet"


def test_a_life_that_never_begins_writes_nothing_behind_the_next(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.dispatched(Slot(0, 0, 0), replica=0)
    never = Ledger.resume(path, lines=0, version=0)
    with Ledger.resume(path, lines=0, version=0) as ledger:
        ledger.dispatched(Slot(0, 0, 0), replica=0)
        trained(ledger, [ready(Slot(0, 0, 0), 0)], step=0)
        assert ledger.num_cuts == 2
    written = path.read_text()
    del never
    assert path.read_text() == written
    assert [event["event"] for event in events(path)][-1] == "trained"
