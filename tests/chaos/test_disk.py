"""What the harness reads in a run's folder is what stands there, whole."""

import json
import random
from pathlib import Path

from actors.journal import mend, read
from tests.chaos.disk import checkpoints_of, damage, last_metric, tear


def test_the_last_metric_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_metric(path, "sync/replicas") is None
    lines = [json.dumps({"step": step, "sync/replicas": float(step), "pad": "x" * 3000}) for step in range(40)]
    path.write_text("\n".join(lines) + '\n{"step": 40, "sync/rep')
    assert last_metric(path, "sync/replicas") == 39.0
    assert last_metric(path, "loss") is None
    path.write_text("")
    assert last_metric(path, "sync/replicas") is None


def test_checkpoints_that_are_staged_do_not_count(tmp_path: Path) -> None:
    assert checkpoints_of(tmp_path) == []
    for name in ("version-00000005", ".staged-00000010", "version-00000010"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "file").write_bytes(b"abc")
    assert len(checkpoints_of(tmp_path)) == 2
    assert damage(tmp_path / "checkpoints", "truncate", random.Random(0))
    assert (tmp_path / "checkpoints" / "version-00000005" / "file").read_bytes() == b"abc"
    assert (tmp_path / "checkpoints" / "version-00000010" / "file").read_bytes() != b"abc"


def test_a_torn_journal_has_lost_its_last_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    events = [{"event": "scored", "ordinal": ordinal, "t": 0.5} for ordinal in range(5)]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    tear(path, random.Random(1))
    assert not path.read_bytes().endswith(b"\n")
    mend(path)
    assert read(path) == events
