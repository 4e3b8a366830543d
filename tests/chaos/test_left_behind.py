"""In a cluster that is not its own a run leaves nothing reserved and no actor, whether it ends or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import FOLDER, prepare
from tests.chaos.life import Journal
from tests.chaos.recipe import write_recipe
from tests.chaos.run import GROUPS_PER_BATCH
from tests.chaos.test_node_loss import Machines, until
from tests.deploy.test_job_submit import ROOT
from tests.prove import ONLY_PROVE

GIVEN_BACK_S = 60.0
HELD = """
import json, ray
from ray.util import placement_group_table
ray.init("{address}", log_to_driver=False, logging_level=40)
groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
free, all = ray.available_resources(), ray.cluster_resources()
print(json.dumps(groups + [name for name in all if name == "CPU" and free.get(name, 0.0) < all[name]]))
"""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path / "ray.log")
    machines.head()
    yield machines
    machines.close()


def start(machines: Machines, folder: Path, steps: int) -> subprocess.Popen:
    recipe = write_recipe(folder, steps=steps, seed=0, num_replicas=2, num_rewards=1)
    prepare(folder / "faults")
    log = (folder / "log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.driver", "light", str(recipe), "--address", machines.address],
        env=machines.env | {FOLDER: str(folder / "faults")}, cwd=ROOT, stdout=log, stderr=log,
    )  # fmt: skip


def held(machines: Machines) -> list[str]:
    """Placement groups that are there, and CPU when some are taken."""
    program = [sys.executable, "-c", HELD.format(address=machines.address)]
    done = subprocess.run(program, env=machines.env, cwd=ROOT, capture_output=True, text=True, timeout=90, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def all_is_given_back(machines: Machines) -> None:
    deadline = time.monotonic() + GIVEN_BACK_S
    while left := held(machines):
        assert time.monotonic() < deadline, left


@ONLY_PROVE
@pytest.mark.cluster
def test_nothing_stays_reserved_in_a_cluster_of_others(machines: Machines, tmp_path: Path) -> None:
    killed = start(machines, tmp_path / "killed", steps=1000)
    journal = Journal(tmp_path / "killed" / "run" / "ledger.jsonl")
    try:
        until(killed, lambda: journal.look() and journal.trained >= 2 * GROUPS_PER_BATCH, 120.0)
        assert any(name.startswith("paceline-rollout-") for name in held(machines))
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    all_is_given_back(machines)
    ended = start(machines, tmp_path / "ended", steps=3)
    assert ended.wait(timeout=150) == 0, (tmp_path / "ended" / "log").read_text()
    all_is_given_back(machines)
