"""A machine with a replica on it is lost in mid-run: the others go on, and a spare machine gets the replica."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.journal import fates, read
from tests.chaos.audit import audit
from tests.chaos.faults import FOLDER, prepare
from tests.chaos.life import HEALTH
from tests.chaos.recipe import write_recipe
from tests.chaos.run import GROUPS_PER_BATCH
from tests.deploy.test_job_submit import BIN, ROOT, free_port
from tests.prove import ONLY_PROVE

STEPS = 150


class Machines:
    """Ray nodes as process groups, which can be lost as a whole."""

    def __init__(self, log: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = env | HEALTH
        self.env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._path = log
        self._log = log.open("ab")
        self._nodes: list[psutil.Popen] = []

    def start(self, *arguments: str) -> psutil.Popen:
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", *arguments]
        node = psutil.Popen(command, env=self.env, stdout=self._log, stderr=self._log, start_new_session=True)
        self._nodes.append(node)
        until(node, lambda: self._path.read_text().count("Ray runtime started") == len(self._nodes), 90)
        return node

    def head(self) -> None:
        port = self.address.partition(":")[2]
        self.start("--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false")

    def rollout_node(self) -> psutil.Popen:
        """With room for one replica."""
        return self.start(f"--address={self.address}", "--num-cpus=1", '--resources={"rollouts": 1}')

    @staticmethod
    def lose(node: psutil.Popen) -> None:
        """As when its power fails: nothing of it has time to say goodbye."""
        for process in [node, *node.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        for node in self._nodes:
            self.lose(node)
        self._log.close()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path / "ray.log")
    yield machines
    machines.close()


@ONLY_PROVE
@pytest.mark.cluster
def test_a_lost_machine_costs_its_replica_alone(machines: Machines, tmp_path: Path) -> None:
    machines.head()
    # All of them now: on one machine, a node that starts clears away what the others have unpacked for the job.
    nodes = [machines.rollout_node() for _ in range(3)]
    recipe = write_recipe(tmp_path, steps=STEPS, seed=0, num_replicas=2)
    prepare(tmp_path / "faults")
    log = (tmp_path / "log").open("wb")
    on_nodes = ["pools.rollout.cpus_per_worker=1", "pools.rollout.node_resource=rollouts"]
    train = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.driver", "light", str(recipe), *on_nodes, "--address", machines.address],
        env=machines.env | {FOLDER: str(tmp_path / "faults")}, cwd=ROOT, stdout=log, stderr=log,
    )  # fmt: skip
    journal = tmp_path / "run" / "ledger.jsonl"

    def trained() -> int:
        return sum(fates(read(journal)).trained.values()) if journal.exists() else 0

    try:
        until(train, lambda: trained() >= 6 * GROUPS_PER_BATCH, 150)
        machines.lose(next(node for node in nodes if holds_a_replica(node)))
        assert train.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    finally:
        train.kill()
        log.close()
    found = audit(tmp_path, GROUPS_PER_BATCH, STEPS)
    assert (found.lost, found.duplicated, found.unknown_version_tokens, found.silent_zero_rewards) == (0, 0, 0, 0)
    replicas = {event["replica"] for event in read(journal) if event["event"] == "dispatched"}
    assert len(replicas) == 3, "the spare machine's replica has served"


def holds_a_replica(node: psutil.Popen) -> bool:
    return any("LightRollout" in " ".join(process.cmdline()) for process in node.children(recursive=True))


def until(process: Any, reached: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it did not come that far"
        time.sleep(0.2)
