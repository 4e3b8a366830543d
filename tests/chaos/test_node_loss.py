"""A machine is lost in mid-run, with a replica or a scorer on it: a spare one gets it, and the run goes on."""

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
SCORERS = '--resources={"scorers": 1}'


class Machines:
    """Ray nodes as process groups, which can be lost as a whole."""

    def __init__(self, log: Path) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.env = env | HEALTH | {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}
        self.env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._path = log
        self._log = log.open("ab")
        self.nodes: list[psutil.Popen] = []

    def start(self, *arguments: str) -> psutil.Popen:
        return self.started([str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", *arguments])

    def started(self, command: list[str]) -> psutil.Popen:
        node = psutil.Popen(command, env=self.env, stdout=self._log, stderr=self._log, start_new_session=True)
        self.nodes.append(node)
        until(node, lambda: self._path.read_text().count("Ray runtime started") == len(self.nodes), 90)
        return node

    def head(self) -> psutil.Popen:
        port = self.address.partition(":")[2]
        return self.start("--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--labels=tier=head")

    def rollout_node(self) -> psutil.Popen:
        """With room for one replica."""
        return self.start(f"--address={self.address}", "--num-cpus=1", '--resources={"rollouts": 1}')

    @staticmethod
    def lose(node: psutil.Popen) -> None:
        """As when its power fails: nothing of it has time to say goodbye."""
        processes = [node]
        with contextlib.suppress(psutil.NoSuchProcess):  # one that was drained has gone by itself
            processes += node.children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        for node in self.nodes:
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
    on_nodes = ["pools.rollout.cpus_per_worker=1", "pools.rollout.node_resource=rollouts"]
    on_nodes += on_head("policy", "reference", "reward")
    train_and_lose(machines, tmp_path, 2, on_nodes, lambda: next(node for node in nodes if holds(node, "LightRollout")))
    replicas = {event["replica"] for event in read(tmp_path / "run" / "ledger.jsonl") if event["event"] == "dispatched"}
    assert len(replicas) == 3, "the spare machine's replica has served"


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.parametrize("pool", ["reward", "reference"])
def test_a_lost_machine_with_a_scorer_costs_time_alone(machines: Machines, tmp_path: Path, pool: str) -> None:
    """Ray starts the worker again on the spare machine, and what it owed is asked for again."""
    machines.head()
    nodes = [machines.start(f"--address={machines.address}", "--num-cpus=1", SCORERS) for _ in range(2)]
    on_nodes = ["pools.reward.num_workers=1", f"pools.{pool}.node_resource=scorers"]
    on_nodes += on_head("policy", "rollout", {"reward": "reference", "reference": "reward"}[pool])
    actor = {"reward": "ChaosReward", "reference": "LightReference"}[pool]
    train_and_lose(machines, tmp_path, 2, on_nodes, lambda: next(node for node in nodes if holds(node, actor)))
    said = (tmp_path / "log").read_text()
    assert f"warning: {pool} worker 0 had died and was started again" in said


@ONLY_PROVE
@pytest.mark.cluster
def test_a_lost_machine_with_the_policy_costs_steps_alone(machines: Machines, tmp_path: Path) -> None:
    """The rank is built again on the other machine that bears the label, and goes on from the newest cut."""
    machines.head()
    nodes = [machines.start(f"--address={machines.address}", "--num-cpus=1", "--labels=tier=train") for _ in range(2)]
    on_nodes = ["pools.policy.node_labels={tier: train}", *on_head("reference", "reward", "rollout")]
    train_and_lose(machines, tmp_path, 2, on_nodes, lambda: next(node for node in nodes if holds(node, "LightPolicy")))
    assert "; the policy is built again and goes on from step" in (tmp_path / "log").read_text()


def on_head(*pools: str) -> list[str]:
    """They are not on the machines that come and go."""
    return [f"pools.{pool}.node_labels={{tier: head}}" for pool in pools]


def train_and_lose(
    machines: Machines, folder: Path, num_replicas: int, overrides: list[str], victim: Callable[[], psutil.Popen]
) -> None:
    """A whole run that loses a machine on its way, and nothing else."""
    recipe = write_recipe(folder, steps=STEPS, seed=0, num_replicas=num_replicas)
    prepare(folder / "faults")
    log = (folder / "log").open("wb")
    train = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.driver", "light", str(recipe), *overrides, "--address", machines.address],
        env=machines.env | {FOLDER: str(folder / "faults")}, cwd=ROOT, stdout=log, stderr=log,
    )  # fmt: skip
    journal = folder / "run" / "ledger.jsonl"

    def trained() -> int:
        return sum(fates(read(journal)).trained.values()) if journal.exists() else 0

    try:
        until(train, lambda: trained() >= 6 * GROUPS_PER_BATCH, 150)
        machines.lose(victim())
        assert train.wait(timeout=200) == 0, (folder / "log").read_text()
    finally:
        train.kill()
        log.close()
    found = audit(folder, GROUPS_PER_BATCH, STEPS)
    assert (found.lost, found.duplicated, found.unknown_version_tokens, found.silent_zero_rewards) == (0, 0, 0, 0)


def holds(node: psutil.Popen, actor: str) -> bool:
    return any(actor in " ".join(process.cmdline()) for process in node.children(recursive=True))


def until(process: Any, reached: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, "it did not come that far"
        time.sleep(0.2)
