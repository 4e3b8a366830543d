"""What a plan says is what Ray does: every bundle lies on the node that was planned for it, until that is lost.

The nodes are real raylets with fake GPUs on this machine.
"""

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from placement.cluster import ClusterSpec, from_ray
from placement.config import PoolConfig
from placement.elastic import Place
from placement.groups import ReservedPools, Singly, reserve
from placement.live import plan_now
from placement.plan import Bundle, PlacementError, PlacementPlan, plan
from placement.seats import ask_for
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
    wanted = len(planned.bundles["rollout"])
    singly = {"rollout": Singly(rng.randint(1, wanted), wanted)} if rng.random() < 0.5 else {}
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


@pytest.mark.parametrize(("wanted_replicas", "settle_s"), [(4, 30.0), (6, 6.0)], ids=["all", "two that do not fit"])
def test_replicas_that_come_and_go_are_planned_as_many_as_there_is_room_for(
    whole: ClusterSpec, wanted_replicas: int, settle_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run begins with the fewest of them, and the others lie where the plan of all has them."""
    monkeypatch.setattr("placement.groups._SETTLE_S", settle_s)  # how soon they are granted is Ray's affair
    replica = {"gpus_per_worker": 2, "cpus_per_worker": 0.1}
    pools = {
        number: {
            "policy": PoolConfig(num_workers=2, gpus_per_worker=1, cpus_per_worker=0.1, node_labels={"rack": "1"}),
            "rollout": PoolConfig(num_workers=number, **replica),
        }
        for number in range(1, 7)
    }
    assert len(whole.nodes) == len(MACHINES), "of 10 GPUs the policy has 2"
    wanted = plan(pools[4], whole)
    planned = plan_now(pools[wanted_replicas], [pools[fewer] for fewer in range(wanted_replicas - 1, 0, -1)])
    assert planned_ids(planned) == planned_ids(wanted)
    reserved = reserve(planned, 30.0, {"rollout": Singly(1, wanted_replicas)})
    try:
        assert planned_ids(reserved.plan) == planned_ids(wanted)
        assert reserved.strays == ()
        more = wanted_replicas - 4
        assert granted(reserved)["rollout"] == [*planned_ids(wanted)["rollout"], *[""] * more]
        assert [seat.place for seat in reserved.seats["rollout"].look()] == [Place.GRANTED] * 4 + [Place.ASKED] * more
    finally:
        reserved.release()


def test_two_who_each_hold_a_part_of_what_they_need_both_end_in_time_and_hold_nothing(
    whole: ClusterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three GPUs each, and four there are; whoever comes then has all."""
    together = threading.Barrier(2)

    def asked(bundle: Bundle) -> PlacementGroup:
        group = ask_for(bundle)
        together.wait(30)
        return group

    def given_back(group: PlacementGroup) -> None:
        together.wait(30)
        remove_placement_group(group)

    pools = {
        "policy": PoolConfig(num_workers=3, gpus_per_worker=1, cpus_per_worker=0.1, node_labels={"tier": "serve"}),
    }
    planned = plan_now(pools)
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as both:
        patch.setattr("placement.groups.ask_for", asked)
        patch.setattr("placement.groups.remove_placement_group", given_back)
        started = time.monotonic()
        ends = [end.exception(timeout=60) for end in [both.submit(reserve, planned, 3.0) for _ in range(2)]]
    assert time.monotonic() - started < 15.0
    for end in ends:
        assert isinstance(end, PlacementError)
        told = (
            r"not reserved within 3 s: pool 'policy' \(1 x 1 GPUs and 0.1 CPUs on nodes with tier=serve\); 6 of 10 GPUs"
        )
        assert re.match(told, str(end)), str(end)
    until(lambda: held() == {"CPU": 0, "GPU": 0, "fast": 0}, "both have given back what they held")
    reserve(planned, 30.0).release()


@ray.remote(num_cpus=0)
class Worker:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def sees(self) -> tuple[str, list[str]]:
        """Its node, and the GPUs that it was given or told of."""
        return self.node(), os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")


def test_whoever_lies_with_the_policy_is_on_its_ranks_nodes_and_sees_their_gpus(whole: ClusterSpec) -> None:
    """Four ranks over two nodes, a replica of two GPUs on each node, a reference with each of the first two; and once
    more when one is built again."""
    small = {"cpus_per_worker": 0.1, "colocate_with": "policy"}
    pools = {
        "policy": PoolConfig(
            num_workers=4, gpus_per_worker=1, cpus_per_worker=0.1, strategy="spread", node_labels={"rack": "1"}
        ),
        "rollout": PoolConfig(num_workers=2, gpus_per_worker=2, **small),
        "reference": PoolConfig(num_workers=2, gpus_per_worker=1, **small),
    }
    planned = plan_now(pools)
    assert len(set(planned_ids(planned)["policy"])) == 2
    reserved = reserve(planned, 30.0)
    try:
        assert planned_ids(reserved.plan) == planned_ids(planned)
        until(lambda: held()["GPU"] == 4, "those who share have none of their own")
        workers = {
            pool: [Worker.options(**reserved.options(pool, number)).remote() for number in range(config.num_workers)]
            for pool, config in pools.items()
        }
        seen = {pool: ray.get([each.sees.remote() for each in of], timeout=120) for pool, of in workers.items()}
        ranks = seen["policy"]
        assert [node for node, _ in ranks] == planned_ids(planned)["policy"]
        assert len({(node, gpu) for node, (gpu,) in ranks}) == 4
        assert seen["reference"] == ranks[:2]
        assert seen["rollout"] == [(ranks[first][0], ranks[first][1] + ranks[first + 1][1]) for first in (0, 2)]
        for pool in ("rollout", "reference"):
            reserved.check(pool, 1)
            ray.kill(workers[pool][1])
            again = Worker.options(**reserved.options(pool, 1)).remote()
            assert ray.get(again.sees.remote(), timeout=60) == seen[pool][1]
    finally:
        reserved.release()


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
