"""What a plan says is what Ray does: every bundle lies on the node that was planned for it, until that is lost.

The nodes are real raylets with fake GPUs on this machine.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from placement.cluster import ClusterSpec, from_ray
from placement.config import PoolConfig
from placement.groups import ReservedPools, reserve
from placement.live import plan_now
from placement.plan import PlacementError, PlacementPlan, plan
from tests.prove import PROVING

pytestmark = pytest.mark.cluster

NUM_CASES = 400 if PROVING else 100
SPARE = {"tier": "spare"}


@dataclass(frozen=True)
class Machine:
    cpus: int
    gpus: int
    labels: Mapping[str, str]
    resources: Mapping[str, float]


MACHINES = (
    Machine(2, 0, {}, {}),
    Machine(2, 2, {"tier": "train"}, {"fast": 1.0}),
    Machine(3, 4, {"tier": "train", "rack": "1"}, {}),
    Machine(2, 4, {"tier": "serve", "rack": "1"}, {"fast": 1.0}),
)


@pytest.fixture(scope="module")
def machines() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as env:
        env.setenv("RAY_prestart_worker_first_driver", "0")  # a process for each CPU, of which none is used here
        cluster = Cluster()
        for machine in MACHINES:
            add(cluster, machine)
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


def add(cluster: Cluster, machine: Machine) -> Any:
    return cluster.add_node(
        num_cpus=machine.cpus,
        num_gpus=machine.gpus,
        labels=dict(machine.labels),
        resources=dict(machine.resources),
        include_dashboard=False,
    )


@pytest.fixture
def whole(machines: Cluster) -> ClusterSpec:
    """All nodes, with nothing reserved on them."""
    until(lambda: held() == {"CPU": 0, "GPU": 0, "fast": 0}, "what earlier tests held is free again")
    return from_ray(ray.nodes())


def until(reached: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def held() -> dict[str, float]:
    free, total = ray.available_resources(), ray.cluster_resources()
    return {kind: round(total[kind] - free.get(kind, 0.0), 4) for kind in ("CPU", "GPU", "fast")}


def drawn(rng: random.Random, whole: ClusterSpec) -> PlacementPlan:
    """Of pools on some of the nodes; Ray itself has the choice of all."""
    while True:
        some = ClusterSpec(tuple(rng.sample(whole.nodes, rng.randint(1, len(whole.nodes)))))
        pools = {
            name: PoolConfig(
                num_workers=rng.randint(1, 3),
                gpus_per_worker=rng.choice([0, 0, 1, 1, 2]),
                cpus_per_worker=rng.choice([0.1, 0.25, 0.5, 1.0]),
                strategy=rng.choice(["pack", "spread"]),
                node_resource=rng.choice([None, None, None, "fast"]),
                node_labels=rng.choice([{}, {}, {"tier": "train"}, {"rack": "1"}, {"tier": "serve", "rack": "1"}]),
            )
            for name in ("policy", "reference", "reward", "rollout")
        }
        try:
            return plan(pools, some)
        except PlacementError:
            continue


def granted(reserved: ReservedPools) -> dict[str, list[str]]:
    """The nodes of the bundles, as Ray tells them."""
    found = {
        pool: [node for group in groups for node in placement_group_table(group)["bundles_to_node_id"].values()]
        for pool, groups in reserved.groups.items()
    }
    return found | {pool: [seat.node for seat in seats.look()] for pool, seats in reserved.seats.items()}


def planned_ids(planned: PlacementPlan) -> dict[str, list[str]]:
    return {pool: [bundle.node_id for bundle in bundles] for pool, bundles in planned.bundles.items()}


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_every_bundle_lies_where_it_was_planned(whole: ClusterSpec, case: int) -> None:
    rng = random.Random(case)
    planned = drawn(rng, whole)
    singly = {"rollout": len(planned.bundles["rollout"])} if rng.random() < 0.5 else {}
    reserved = reserve(planned, 30.0, singly)
    try:
        assert granted(reserved) == planned_ids(planned)
        assert (reserved.plan, reserved.strays) == (planned, ())
    finally:
        reserved.release()


def test_a_plan_goes_round_what_others_hold(whole: ClusterSpec) -> None:
    """And one that was made without looking is told of."""
    pools = {"policy": PoolConfig(num_workers=3, gpus_per_worker=1, cpus_per_worker=0.1)}
    idle = plan(pools, whole)
    assert plan_now(pools) == idle
    (theirs,) = {bundle.node_id for bundle in idle.bundles["policy"]}
    others = placement_group([{"GPU": 3, "CPU": 1}], bundle_label_selector=[{"ray.io/node-id": theirs}])
    assert others.wait(30)
    planned = plan_now(pools)
    assert theirs not in planned_ids(planned)["policy"]
    reserved = reserve(planned, 30.0)
    assert granted(reserved) == planned_ids(planned)
    reserved.release()
    until(lambda: held()["GPU"] == 3, "it is given back")
    blind = reserve(idle, 30.0)
    assert len(blind.strays) == 2
    assert all(", where it was planned, had no room for it" in stray for stray in blind.strays)
    assert granted(blind) == planned_ids(blind.plan) != planned_ids(idle)
    blind.release()
    remove_placement_group(others)


def test_what_others_hold_all_of_is_waited_for_and_named(whole: ClusterSpec) -> None:
    pools = {"policy": PoolConfig(num_workers=2, gpus_per_worker=2, cpus_per_worker=0.1, node_labels={"tier": "serve"})}
    idle = plan_now(pools)
    (theirs,) = set(planned_ids(idle)["policy"])
    others = placement_group([{"GPU": 2, "CPU": 0.1}], bundle_label_selector=[{"ray.io/node-id": theirs}])
    assert others.wait(30)
    assert plan_now(pools) == idle
    with pytest.raises(PlacementError, match=r"pool 'policy' \(1 x 2 GPUs and 0.1 CPUs on nodes with tier=serve\); "):
        reserve(idle, 1.0)
    until(lambda: held()["GPU"] == 2, "nothing of ours stays reserved")
    remove_placement_group(others)


@ray.remote(num_cpus=0)
class Worker:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_a_worker_whose_machine_is_lost_goes_to_another_that_bears_its_labels(
    machines: Cluster, whole: ClusterSpec
) -> None:
    other, *_ = spares = [add(machines, Machine(1, 1, SPARE, {})) for _ in range(2)]
    pools = {
        "policy": PoolConfig(gpus_per_worker=1, cpus_per_worker=0.5, node_labels={"tier": "train"}),
        "reference": PoolConfig(gpus_per_worker=1, cpus_per_worker=0.5, node_labels=SPARE),
    }
    reserved = reserve(plan(pools, from_ray(ray.nodes())), 30.0)
    try:
        before = granted(reserved)
        options = reserved.options("reference", 0)
        worker = Worker.options(max_restarts=1, max_task_retries=3, **options).remote()
        assert [ray.get(worker.node.remote(), timeout=60)] == before["reference"]
        ours, other = sorted(spares, key=lambda node: node._node_id != before["reference"][0])
        machines.remove_node(ours)
        until(lambda: granted(reserved)["reference"] == [other._node_id], "the bundle is placed again")
        assert granted(reserved)["policy"] == before["policy"]
        assert ray.get(worker.node.remote(), timeout=60) == other._node_id
        ray.kill(worker)
        again = Worker.options(**options).remote()  # as the policy's ranks and the replicas are made anew
        assert ray.get(again.node.remote(), timeout=60) == other._node_id
    finally:
        reserved.release()
        machines.remove_node(other)
