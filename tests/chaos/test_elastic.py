"""Replicas come and go while a run trains, by request and with their machines: nothing is lost, the bound is kept."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.journal import read
from deploy.scale import scale
from deploy.session import shut_in
from tests.chaos.audit import audit
from tests.chaos.faults import FOLDER, prepare, set_pace
from tests.chaos.recipe import ROOT, write_recipe
from tests.chaos.run import GROUPS_PER_BATCH
from tests.chaos.test_node_loss import Machines, holds, on_head, until
from tests.deploy.test_job_submit import BIN
from tests.prove import ONLY_PROVE

pytestmark = [pytest.mark.cluster, ONLY_PROVE]


class ElasticRun:
    """A run watched by its files."""

    def __init__(self, folder: Path, steps: int, env: dict[str, str], overrides: list[str], engine: str) -> None:
        self.folder, self.steps = folder, steps
        recipe = write_recipe(folder, steps=steps, seed=0, num_replicas=1, engine=engine)
        prepare(folder / "faults")
        set_pace(folder / "faults", 1.0)  # engines need seconds to start, and steps are few
        self._log = (folder / "log").open("wb")
        self.process = psutil.Popen(
            [sys.executable, "-m", "tests.chaos.driver", engine, str(recipe), *overrides],
            env=env | {FOLDER: str(folder / "faults")}, cwd=ROOT, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    @property
    def said(self) -> str:
        return (self.folder / "log").read_text()

    def events(self, kind: str) -> list[Any]:
        journal = self.folder / "run" / "ledger.jsonl"
        return [event for event in read(journal) if event["event"] == kind] if journal.exists() else []

    def replicas(self) -> float:
        """That served after the last step."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["rollout/replicas"] if lines else 0

    def serves(self) -> set[int]:
        """Who was given groups."""
        return {event["replica"] for event in self.events("dispatched")}

    def trained(self) -> int:
        return len(self.events("trained")) // GROUPS_PER_BATCH

    def until(self, reached: Callable[[], bool], timeout_s: float = 120.0) -> None:
        until(self.process, reached, timeout_s)

    def hurry(self) -> None:
        """What was to be seen was seen."""
        set_pace(self.folder / "faults", 0.0)

    def ended(self) -> dict[str, Any]:
        """The summary, after the books have been held against each other."""
        assert self.process.wait(timeout=200) == 0, self.said
        found = audit(self.folder, GROUPS_PER_BATCH, self.steps)
        assert (found.lost, found.duplicated, found.unknown_version_tokens, found.silent_zero_rewards) == (0, 0, 0, 0)
        summary: dict[str, Any] = json.loads((self.folder / "run" / "summary.json").read_text())
        assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"] == 1
        assert summary["groups_quarantined"] == 0
        return summary

    def close(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            self.process.terminate()
            self.process.wait(timeout=30)
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()
        self._log.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Machines]:
    machines = Machines(tmp_path / "ray.log")
    machines.head()
    yield machines
    machines.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ElasticRun]]:
    runs: list[ElasticRun] = []

    def begin(steps: int, env: dict[str, str], *overrides: str, engine: str = "light") -> ElasticRun:
        runs.append(ElasticRun(tmp_path, steps, env, list(overrides), engine))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("engine", "most", "steps"), [("light", 3, 100), ("vllm", 2, 250)])
def test_a_run_is_scaled_up_and_down_while_it_trains(
    engine: str, most: int, steps: int, start: Callable[..., ElasticRun]
) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"HF_HUB_OFFLINE": "1"}
    shut_in(env)
    alone = ("pools.rollout.num_workers=1", f"pools.rollout.max_workers={most}", "rollout.leave_grace_s=2")
    run = start(steps, env, *alone, engine=engine)
    run.until(lambda: run.trained() >= 2)
    assert run.replicas() == 1
    assert f"taken: {most}" in scale(run.folder / "run", f"rollout={most}", 30.0)
    run.until(lambda: run.serves() == set(range(most)), 200)
    run.until(lambda: run.replicas() == most)
    assert "taken: 1" in scale(run.folder / "run", "rollout=1", 30.0)
    run.until(lambda: run.replicas() == 1)
    at = run.trained()
    run.until(lambda: run.trained() >= at + 3)
    run.hurry()
    summary = run.ended()
    others = most - 1
    assert (summary["replicas_joined"], summary["replicas_left"], summary["replicas_rebuilt"]) == (others, others, 0)
    assert not {"failed", "preempted", "late"} & set(summary["waste"]), "what a leaving replica has is handed on"


def test_who_is_on_a_machine_that_goes_leaves_and_another_machine_gets_one(
    cluster: Machines, start: Callable[..., ElasticRun]
) -> None:
    """One is drained, one is lost without notice; spare ones take their replicas, and then there is none to spare."""
    # All of them now: on one machine, a node that starts clears away what the others have unpacked for the job.
    nodes = [cluster.rollout_node() for _ in range(4)]
    run = start(
        200, cluster.env, "pools.rollout.num_workers=2", "pools.rollout.min_workers=1", "rollout.leave_grace_s=2",
        "pools.rollout.cpus_per_worker=1", "pools.rollout.node_resource=rollouts", "--address", cluster.address,
        *on_head("policy", "reference", "reward"),
    )  # fmt: skip
    run.until(lambda: run.replicas() == 2, 150)
    drain(cluster, next(node for node in nodes if holds(node, "LightRollout")))
    run.until(lambda: "its machine is being drained" in run.said and run.serves() >= {2})
    run.until(lambda: run.replicas() == 2)
    for lost, newcomers in (1, {3}), (2, set()):
        alive = [node for node in nodes if node.poll() is None and holds(node, "LightRollout")]
        cluster.lose(alive[0])
        run.until(lambda lost=lost: run.said.count("its machine is gone") == lost)
        run.until(lambda newcomers=newcomers: run.serves() >= newcomers)
    run.until(lambda: run.replicas() == 1)
    at = run.trained()
    run.until(lambda: run.trained() >= at + 5)
    run.hurry()
    summary = run.ended()
    assert summary["replicas_left"] == 3
    assert summary["replicas_rebuilt"] == 0, "a machine that goes is no failure of its replica"


def test_a_run_without_machines_enough_ends_with_the_name_of_the_pool(
    cluster: Machines,
    start: Callable[..., ElasticRun],
) -> None:
    node = cluster.rollout_node()
    run = start(
        200, cluster.env, "pools.rollout.max_workers=2", "rollout.capacity_timeout_s=5",
        "pools.rollout.cpus_per_worker=1", "pools.rollout.node_resource=rollouts", "--address", cluster.address,
        *on_head("policy", "reference", "reward"),
    )  # fmt: skip
    run.until(lambda: run.trained() >= 2, 150)
    cluster.lose(node)
    assert run.process.wait(timeout=120) == 1, run.said
    assert "warning: 0 of at least 1 rollout replicas have a machine; the run waits for more, 5 s at most" in run.said
    assert "error: pool 'rollout': 0 of at least 1 replicas (pools.rollout.min_workers) have had a machine" in run.said
    assert "Traceback" not in run.said


def drain(machines: Machines, node: psutil.Popen) -> None:
    """As a cloud's notice of preemption is passed on."""
    raylet = next(child for child in node.children(recursive=True) if child.name() == "raylet")
    flags = [word.partition("=") for word in raylet.cmdline()]
    node_id = next(value for name, _, value in flags if name.replace("_", "-") == "--node-id")
    why = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=notice"]
    command = [str(BIN / "ray"), "drain-node", f"--address={machines.address}", f"--node-id={node_id}", *why]
    subprocess.run(command, env=machines.env, timeout=60, check=True)
