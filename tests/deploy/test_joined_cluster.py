"""A run in a cluster that it has joined: it names what it has lost, and leaves nothing there when it is stopped."""

import re
import signal
import time
from pathlib import Path

import pytest

from actors.checkpoint.store import CheckpointStore
from tests.chaos.life import Journal
from tests.chaos.run import GROUPS_PER_BATCH
from tests.chaos.test_left_behind import GIVEN_BACK_S, held, machines, start
from tests.chaos.test_node_loss import Machines, until
from tests.prove import ONLY_PROVE

__all__ = ["machines"]


@ONLY_PROVE
@pytest.mark.cluster
def test_a_run_that_is_stopped_gives_back_what_it_held(machines: Machines, tmp_path: Path) -> None:
    train = start(machines, tmp_path / "stopped", steps=1000)
    journal = Journal(tmp_path / "stopped" / "run" / "ledger.jsonl")
    try:
        until(train, lambda: journal.look() and journal.trained >= 2 * GROUPS_PER_BATCH, 120.0)
        train.send_signal(signal.SIGTERM)
        assert train.wait(timeout=100) == 75, (tmp_path / "stopped" / "log").read_text()
    finally:
        train.kill()
    assert CheckpointStore(tmp_path / "stopped" / "run" / "checkpoints").versions()
    deadline = time.monotonic() + GIVEN_BACK_S
    while left := held(machines):
        assert time.monotonic() < deadline, left


@ONLY_PROVE
@pytest.mark.cluster
def test_a_run_whose_head_dies_ends_and_names_it(machines: Machines, tmp_path: Path) -> None:
    train = start(machines, tmp_path / "orphan", steps=1000)
    log = tmp_path / "orphan" / "log"
    journal = Journal(tmp_path / "orphan" / "run" / "ledger.jsonl")
    try:
        until(train, lambda: journal.look() and journal.trained >= 2 * GROUPS_PER_BATCH, 120.0)
        began = time.monotonic()
        machines.close()
        code = train.wait(timeout=150)
    finally:
        train.kill()
    seconds, port = time.monotonic() - began, machines.address.partition(":")[2]
    assert code == 1
    assert re.search(rf"error: the head of the Ray cluster, [\d.]+:{port}, is gone", " ".join(log.read_text().split()))
    assert seconds < 100, "Ray itself ends a process after 60 s without a head"
