"""A whole run with its pools on different nodes of a cluster: every worker is where `plan` said, and nothing is lost.

The nodes are three raylets on this machine; each worker is one of its node's processes, which is looked at.
"""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from actors.journal import fates, read
from tests.chaos.test_left_behind import machines
from tests.chaos.test_node_loss import Machines, until
from tests.deploy.test_job_submit import ROOT
from tests.deploy.test_methods import LIGHT
from tests.prove import ONLY_PROVE

__all__ = ["machines"]

STEPS, GROUPS = 6, 3
ACTORS = {"policy": "PolicyActor", "reference": "ReferenceActor", "reward": "RewardActor"}


@pytest.mark.cluster
def test_pools_on_different_nodes_train_and_every_worker_is_where_it_was_planned(
    machines: Machines, tmp_path: Path
) -> None:
    """Bound by a label (policy and reference) and by a custom resource (rollouts); light engines, all else is real."""
    command = [sys.executable, "-m", "tests.deploy.light_engines", machines.address]
    check_whole_run(machines, tmp_path, ACTORS | {"rollout": "LightRollout"}, ordered(tmp_path), command)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_engines_on_a_node_of_their_own_train_with_two_ranks_on_another(machines: Machines, tmp_path: Path) -> None:
    """Nothing stands in for anything."""
    order = [*ordered(tmp_path), "pools.policy.num_workers=2", "generation.max_completion_length=32"]
    command = [sys.executable, "-m", "deploy", "train", *order, "--address", machines.address]
    check_whole_run(machines, tmp_path, ACTORS | {"rollout": "RolloutActor"}, order, command)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_replicas_and_references_lie_with_the_ranks_of_a_policy_on_two_nodes(
    machines: Machines, tmp_path: Path
) -> None:
    shared = '{"num_workers": 2, "cpus_per_worker": 0.1, "colocate_with": "policy"}'
    ranks = '{"num_workers": 2, "cpus_per_worker": 0.1, "strategy": "spread", "node_labels": {"tier": "train"}}'
    order = [*ordered(tmp_path), f"pools.policy={ranks}", f"pools.rollout={shared}", f"pools.reference={shared}"]
    command = [sys.executable, "-m", "tests.deploy.light_engines", machines.address]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(23)))
    nodes = [machines.start(f"--address={machines.address}", "--num-cpus=1", "--labels=tier=train") for _ in range(2)]
    planned = planned_nodes(machines, order)
    assert {*planned["policy"]} == {id_of(node) for node in nodes}
    assert planned["rollout"] == planned["reference"] == planned["policy"]
    run_as_planned(machines, tmp_path, ACTORS | {"rollout": "LightRollout"}, order, command, planned)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_nodes_that_share_no_network_but_a_bridge_train_together(tmp_path: Path) -> None:
    """A policy rank on each of two machines, and a host name, an address and a /tmp/ray of its own for each machine."""
    alone = ["unshare", "--map-root-user", "--net", "--mount"]
    probe = [*alone, "sh", "-e", "-c", "mount -t tmpfs none /run && mkdir /run/netns && ip netns add x"]
    found = subprocess.run(probe, capture_output=True, text=True, timeout=30, check=False)
    if found.returncode != 0:
        pytest.skip(f"network namespaces cannot be made here: {found.stderr.strip()}")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(23)))
    two = ["pools.policy.num_workers=2", "pools.policy.strategy=spread"]
    (tmp_path / "order.json").write_text(json.dumps([[*ordered(tmp_path), *two]]))
    command = [*alone, sys.executable, "-m", "tests.deploy.machines_apart", str(tmp_path)]
    with (tmp_path / "log").open("wb") as log:
        run = psutil.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            assert run.wait(timeout=550) == 0, (tmp_path / "log").read_text()
        finally:
            Machines.lose(run)
    placed = json.loads((tmp_path / "run" / "placement.json").read_text())
    assert sorted(placed["policy"]) == ["node1", "node2"]
    assert placed["rollout"] == ["node2", "node2"]
    assert set(placed["reference"]) <= {"node1", "node2"}
    check_books(tmp_path / "run")


def ordered(folder: Path) -> list[str]:
    """The recipe and its overrides."""
    return [
        "recipes/methods/rloo.yaml", *LIGHT, f"steps={STEPS}", f"groups_per_batch={GROUPS}",
        f"dataset={{path: {folder}/rows.jsonl}}", f"run_dir={folder}/run",
        "pools.policy.node_labels={tier: train}", "pools.reference.node_labels={tier: train}",
        "pools.rollout.num_workers=2", "pools.rollout.node_resource=rollouts",
    ]  # fmt: skip


def check_whole_run(
    machines: Machines, folder: Path, actors: dict[str, str], order: list[str], command: list[str]
) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(23)))
    train = machines.start(f"--address={machines.address}", "--num-cpus=1", "--labels=tier=train")
    serve = machines.start(f"--address={machines.address}", "--num-cpus=1", '--resources={"rollouts": 1}')
    planned = planned_nodes(machines, order)
    assert {*planned["policy"], *planned["reference"]} == {id_of(train)}
    assert planned["rollout"] == [id_of(serve)] * 2
    run_as_planned(machines, folder, actors, order, command, planned)


def run_as_planned(
    machines: Machines,
    folder: Path,
    actors: dict[str, str],
    order: list[str],
    command: list[str],
    planned: dict[str, list[str]],
) -> None:
    """Every worker was where it was planned, and the books are right."""
    (folder / "order.json").write_text(json.dumps([order]))
    seen = run_and_look(machines, folder, command, actors)
    placed = json.loads((folder / "run" / "placement.json").read_text())
    assert {pool: [short(node) for node in nodes] for pool, nodes in placed.items()} == planned
    assert seen == {(pool, node): nodes.count(node) for pool, nodes in planned.items() for node in nodes}
    check_books(folder / "run")


def run_and_look(
    machines: Machines, folder: Path, command: list[str], actors: dict[str, str]
) -> dict[tuple[str, str], int]:
    """How many workers of each pool were among each node's processes, at most, while the run went to its end."""
    nodes = {id_of(node): node for node in machines.nodes}
    seen: dict[tuple[str, str], int] = {}
    with (folder / "order.json").open() as said, (folder / "log").open("wb") as log:
        run = subprocess.Popen(command, stdin=said, stdout=log, stderr=log, env=machines.env, cwd=ROOT)

    def has_ended() -> bool:
        for name, node in nodes.items():
            titles = [title_of(process) for process in node.children(recursive=True)]
            for pool, actor in actors.items():
                if count := sum(title.startswith(f"ray::{actor}") for title in titles):
                    seen[pool, name] = max(count, seen.get((pool, name), 0))
        return run.poll() is not None

    try:
        until(machines.nodes[0], has_ended, 300.0)
    finally:
        run.kill()
    assert run.returncode == 0, (folder / "log").read_text()
    return seen


def planned_nodes(machines: Machines, order: list[str]) -> dict[str, list[str]]:
    """What `python -m deploy plan` says of the live cluster."""
    command = [sys.executable, "-m", "deploy", "plan", *order, "--address", machines.address]
    env = machines.env | {"COLUMNS": "200"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in done.stdout.splitlines() if row.startswith("│")]
    planned: dict[str, list[str]] = {}
    for pool, worker, node, *_ in rows:
        planned.setdefault(pool, []).append(short(node))
        assert int(worker) == len(planned[pool]) - 1
    return planned


def short(name: str) -> str:
    """Of a node's name in plans, what tells it from the others on its host: the beginning of Ray's id."""
    return name.rpartition("-")[2]


def id_of(node: psutil.Popen) -> str:
    """The same of a node that runs."""
    raylet = next(child for child in node.children(recursive=True) if child.name() == "raylet")
    flags = [word.partition("=") for word in raylet.cmdline()]
    return next(value for name, _, value in flags if name.replace("_", "-") == "--node-id")[:8]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def check_books(run: Path) -> None:
    """Every group was trained once, the bound was kept, and a model is there."""
    found = fates(read(run / "ledger.jsonl"))
    assert not list(found.lost())
    assert sum(found.trained.values()) == len(found.trained) == STEPS * GROUPS
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["groups_lost"], summary["groups_duplicated"], summary["weight_version"]) == (0, 0, STEPS)
    assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"]
    with safe_open(run / "model" / "model.safetensors", "pt") as weights:
        assert len(list(weights.keys())) > 0
