"""W&B has every step that was logged, also those that a run took again, under one id; read from its own files."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from actors.run.tracker import Tracker, _run_id, check_tracker

ROOT = str(Path(__file__).parents[3])
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
    with Tracker("test", "run", folder, {"steps": 9}, print) as tracker:
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
    with Tracker(None, "run", tmp_path, {}, print) as tracker:
        tracker.log(0, {"reward": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_project_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_tracker("test")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"logging.wandb_project: there is no .* key; set WANDB_API_KEY"):
        check_tracker("test")


def test_a_project_that_can_have_no_such_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logging.wandb_project: Invalid project name 'a/b'.*; choose another name"):
        check_tracker("a/b")


def test_an_id_of_which_half_was_written_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def torn(path: Path, text: str, **options: Any) -> None:
        write(path, text[:4], **options)
        raise OSError("killed")

    with monkeypatch.context() as killed:
        killed.setattr(Path, "write_text", torn)
        with pytest.raises(OSError, match="killed"):
            _run_id(tmp_path, "0123456789abcdef")
    assert _run_id(tmp_path, "fedcba9876543210") == "fedcba9876543210"
    assert _run_id(tmp_path, "another") == "fedcba9876543210"


class Refusing(BaseHTTPRequestHandler):
    """A service to which no key is good."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "permission denied"}]}')

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10.0)


PREPARE = """
import sys
from actors.run.tracker import check_tracker
check_tracker("test")
"""
TRAIN = """
import sys
from pathlib import Path
from actors.run import tracker
tracker._INIT_TIMEOUT_S = 2.0
with tracker.Tracker("test", "run", Path(sys.argv[1]), {}, lambda line: print("SAID", line)) as of:
    for step in range(3):
        of.log(step, {"reward": 1.0})
"""
LOSE = """
import psutil, sys
from pathlib import Path
from actors.run.tracker import Tracker
with Tracker("test", "run", Path(sys.argv[1]), {}, lambda line: print("SAID", line)) as of:
    of.log(0, {"reward": 1.0})
    for child in psutil.Process().children(recursive=True):
        child.kill()
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    for step in range(1, 4):
        of.log(step, {"reward": 1.0})
print("the run has ended well")
"""


HANG = """
import psutil, sys
from pathlib import Path
from actors.run import tracker
tracker._LOG_TIMEOUT_S = 1.0
with tracker.Tracker("test", "run", Path(sys.argv[1]), {}, lambda line: print("SAID", line)) as of:
    of.log(0, {"reward": 1.0})
    for child in psutil.Process().children(recursive=True):
        child.suspend()
    for step in range(1, 1000):
        of.log(step, {f"metric/{number}": 1.5 * step for number in range(200)})
print("the run has ended well")
"""


HANG_AT_ITS_END = """
import psutil, sys
from pathlib import Path
from actors.run import tracker
with tracker.Tracker("test", "run", Path(sys.argv[1]), {}, lambda line: print("SAID", line)) as of:
    of.log(0, {"reward": 1.0})
    for child in psutil.Process().children(recursive=True):
        child.suspend()
    tracker._FINISH_TIMEOUT_S = 0.5
print("the run has ended well")
"""


def online(script: str, folder: Path, url: str, mode: str = "online") -> subprocess.CompletedProcess[str]:
    """A process of its own, because wandb remembers to whom it has spoken."""
    env = os.environ | {
        "WANDB_MODE": mode, "WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40, "HOME": str(folder), "PYTHONPATH": ROOT,
        "WANDB_HTTP_TIMEOUT": "3",
    }  # fmt: skip
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)


def test_a_key_that_is_refused_is_told_before_anything_starts(tmp_path: Path, refusing: str) -> None:
    done = online(PREPARE, tmp_path, refusing)
    assert "ValueError: logging.wandb_project: the Weights & Biases key is refused (" in done.stderr
    assert "permission denied); set WANDB_API_KEY" in done.stderr


NOBODY = "http://127.0.0.1:9"


def test_a_service_that_cannot_be_reached_is_no_reason_not_to_start(tmp_path: Path) -> None:
    done = online(PREPARE, tmp_path, NOBODY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("there", [True, False], ids=["it refuses", "it is away"])
def test_a_run_goes_on_without_its_tracker_and_keeps_the_metrics(tmp_path: Path, refusing: str, there: bool) -> None:
    done = online(TRAIN, tmp_path, refusing if there else NOBODY)
    assert done.returncode == 0, done.stderr
    assert "SAID warning: logging.wandb_project: Weights & Biases fails (" in done.stdout
    assert done.stdout.count("SAID") == 1
    lines, ids, _ = logged(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert ids == {(tmp_path / "wandb_id").read_text().strip()}


@pytest.mark.parametrize("script", [HANG, HANG_AT_ITS_END], ids=["in a step", "at its end"])
def test_a_tracker_that_hangs_does_not_hold_the_run_up_nor_its_end(tmp_path: Path, script: str) -> None:
    """Its process is stopped: what is written to it fills the pipe, and nobody reads."""
    done = online(script, tmp_path, NOBODY, mode="offline")
    assert "the run has ended well" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("SAID") == 1
    assert "Weights & Biases fails (its process has not answered for 1 s)" in done.stdout
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def test_a_tracker_that_dies_in_mid_run_does_not_end_it(tmp_path: Path) -> None:
    done = online(LOSE, tmp_path, NOBODY, mode="offline")
    assert "the run has ended well" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("SAID warning: logging.wandb_project: Weights & Biases fails (") == 1
