"""W&B has every step that was logged, also those that a run took again, under one id; read from its own files."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.run.tracker import Tracker, check_tracker

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(path: Path) -> Iterator[Any]:
    """What wandb has written, in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + _HEADER.size <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER.size:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        record += data[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(record)
            record = b""


def whole(path: Path) -> list[Any]:
    """All records, once the last one is there: wandb's own process writes a little behind."""
    deadline = time.monotonic() + 20.0
    while not (found := list(records(path))) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "wandb has not come to its end"
        time.sleep(0.05)
    return found


def logged(folder: Path) -> tuple[list[dict[str, Any]], set[str], set[tuple[str, str]]]:
    """All lines in order, the ids of the runs, and over which metric each is drawn."""
    lines, ids, drawn = [], set(), set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in whole(path):
            match record.WhichOneof("record_type"):
                case "history":
                    items = record.history.item
                    lines.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
                case "run":
                    ids.add(record.run.run_id)
                case "metric":
                    drawn.add((record.metric.name or record.metric.glob_name, record.metric.step_metric))
    return lines, ids, drawn


def track(folder: Path, *steps: int) -> None:
    with Tracker("test", "run", folder, {"steps": 9}) as tracker:
        for step in steps:
            tracker.log(step, {"reward": step / 10, "staleness/max": 1.0})


def test_a_run_that_goes_back_leaves_no_step_out_and_keeps_its_id(tmp_path: Path) -> None:
    """Back to step 2 in one process, as after a lost policy, and to step 4 in another, as after a kill."""
    track(tmp_path, 0, 1, 2, 3, 2, 3, 4, 5)
    track(tmp_path, 4, 5, 6)
    lines, ids, drawn = logged(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6]
    assert [line["reward"] for line in lines] == [line["step"] / 10 for line in lines]
    assert all(line["staleness/max"] == 1.0 for line in lines)
    assert ids == {(tmp_path / "wandb_id").read_text().strip()}
    assert ("*", "step") in drawn


def test_another_run_has_another_id(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        track(tmp_path / name, 0)
    (one,), (other,) = (logged(tmp_path / name)[1] for name in ("one", "other"))
    assert one != other


def test_an_id_that_the_user_has_chosen_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine1234")
    track(tmp_path, 0)
    assert logged(tmp_path)[1] == {"mine1234"}


def test_without_a_project_nothing_is_written(tmp_path: Path) -> None:
    with Tracker(None, "run", tmp_path, {}) as tracker:
        tracker.log(0, {"reward": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_project_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_tracker("test")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"logging.wandb_project: there is no .* key; set WANDB_API_KEY"):
        check_tracker("test")
