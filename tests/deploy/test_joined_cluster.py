"""A run in a cluster that it has joined: it leaves nothing there, however it ends, and it names what it has lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.journal import fates, read
from tests.chaos.faults import FOLDER, prepare
from tests.chaos.recipe import write_recipe
from tests.chaos.test_node_loss import Machines, machines, until
from tests.deploy.test_job_submit import ROOT
from tests.prove import ONLY_PROVE

__all__ = ["machines"]
STEPS = 400

LOOK = """
import json, ray
ray.init("{address}", logging_level="CRITICAL", log_to_driver=False)
from ray.util import placement_group_table
groups = [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
free, all_of = (kind().get("CPU", 0.0) for kind in (ray.available_resources, ray.cluster_resources))
print(json.dumps({{"groups": groups, "busy": all_of - free}}))
"""


class Train:
    """`python -m deploy train` with light actors in a cluster."""

    def __init__(self, machines: Machines, folder: Path, *overrides: str, steps: int = STEPS) -> None:
        self.machines = machines
        self.folder = folder
        self.recipe = write_recipe(folder, steps=steps, seed=0, num_replicas=1)
        prepare(folder / "faults")
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "tests.chaos.driver", "light", str(self.recipe), *overrides,
                 "--address", machines.address],
                env=machines.env | {FOLDER: str(folder / "faults")}, cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip

    def trained(self) -> int:
        journal = self.folder / "run" / "ledger.jsonl"
        return sum(fates(read(journal)).trained.values()) if journal.exists() else 0

    def until_trained(self, groups: int) -> None:
        until(self.process, lambda: self.trained() >= groups, 120)

    def said(self) -> str:
        return self.log.read_text()


def left(machines: Machines) -> dict[str, Any]:
    """Placement groups that are there, and CPUs that are held; asked for by a process of its own."""
    command = [sys.executable, "-c", LOOK.format(address=machines.address)]
    done = subprocess.run(command, env=machines.env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def end(train: Train, how: str) -> int:
    match how:
        case "ends":
            return train.process.wait(timeout=200)
        case "is killed":
            train.process.send_signal(signal.SIGKILL)
        case "is stopped":
            train.process.send_signal(signal.SIGTERM)
    return train.process.wait(timeout=100)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("how", "code", "steps"),
    [
        ("is killed", -9, STEPS),
        pytest.param("is stopped", 75, STEPS, marks=ONLY_PROVE),
        pytest.param("ends", 0, 12, marks=ONLY_PROVE),
    ],
)
def test_nothing_of_a_run_is_left_in_the_cluster(
    machines: Machines, tmp_path: Path, how: str, code: int, steps: int
) -> None:
    """Its placement groups are given back, and with them every worker."""
    machines.head()
    train = Train(machines, tmp_path / "run", steps=steps)
    try:
        train.until_trained(8)
        held = left(machines)
        assert sorted(held["groups"]) == [f"paceline-{pool}" for pool in ("policy", "reference", "reward", "rollout")]
        assert end(train, how) == code, train.said()
    finally:
        train.process.kill()
    deadline = time.monotonic() + 60.0
    while (found := left(machines)) != {"groups": [], "busy": 0.0}:
        assert time.monotonic() < deadline, found
        time.sleep(1.0)


@pytest.mark.cluster
def test_a_run_whose_head_dies_ends_and_names_it(machines: Machines, tmp_path: Path) -> None:
    """The machine that holds the cluster together: the run is on others."""
    head = machines.head()
    train = Train(machines, tmp_path / "run")
    try:
        train.until_trained(8)
        machines.lose(head)
        began = time.monotonic()
        code = train.process.wait(timeout=150)
    finally:
        train.process.kill()
    print(code, time.monotonic() - began, train.said())
    assert code == 1
