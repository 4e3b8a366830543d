"""Who lies on the policy's GPUs, and where; the rules for that, each with its fix."""

from typing import Any

import pytest
from pydantic import ValidationError

from placement.cluster import ClusterSpec, uniform
from placement.config import PoolConfig, PoolsConfig, RolloutPoolConfig
from placement.home import NODE_ID
from placement.plan import PlacementError, PlacementPlan, plan
from placement.seats import resources_of
from placement.shared import Place, check_place, environment
from tests.placement.test_plan import layout, nodes

GPU = {"gpus_per_worker": 1}
SHARED = {"colocate_with": "policy"}


def pools(policy: dict[str, Any], **others: dict[str, Any]) -> dict[str, PoolConfig]:
    classes = {"rollout": RolloutPoolConfig}
    return {"policy": PoolConfig(**policy)} | {
        name: classes.get(name, PoolConfig)(**config) for name, config in others.items()
    }


def on(placed: PlacementPlan, pool: str) -> list[tuple[int, ...]]:
    return [bundle.on for bundle in placed.bundles[pool]]


def test_a_replica_lies_on_each_of_the_policys_gpus() -> None:
    placed = plan(pools({"num_workers": 8, **GPU}, rollout={"num_workers": 8, **GPU, **SHARED}), uniform(1, 32.0, 8))
    assert on(placed, "rollout") == [(worker,) for worker in range(8)]
    assert [bundle.own_gpus for bundle in placed.bundles["rollout"]] == [0] * 8
    assert sum(bundle.own_gpus for bundles in placed.bundles.values() for bundle in bundles) == 8


def test_whoever_lies_with_a_rank_has_its_cpus_in_that_ranks_bundle() -> None:
    placed = plan(
        pools(
            {"num_workers": 4, **GPU, "cpus_per_worker": 1.0},
            rollout={"num_workers": 2, "gpus_per_worker": 2, "cpus_per_worker": 3.0, **SHARED},
            reference={**GPU, "cpus_per_worker": 0.5, **SHARED},
        ),
        uniform(1, 32.0, 4),
    )
    assert on(placed, "rollout") == [(0, 1), (2, 3)]
    assert on(placed, "reference") == [(0,)]
    assert [bundle.room for bundle in placed.bundles["policy"]] == [3.5, 0.0, 3.0, 0.0]
    assert resources_of(placed.bundles["policy"][0]) == {"CPU": 4.5, "GPU": 1.0}


def test_ranks_under_one_replica_are_on_one_node() -> None:
    """Of nodes with three GPUs each one stays free, where without sharing the ranks would fill both."""
    policy = {"num_workers": 4, **GPU}
    cluster = nodes((32, 3), (32, 3))
    assert layout(plan(pools(policy), cluster)) == {"policy": "aaab"}
    placed = plan(pools(policy, rollout={"num_workers": 2, "gpus_per_worker": 2, **SHARED}), cluster)
    assert layout(placed) == {"policy": "aabb", "rollout": "ab"}


def test_other_pools_are_placed_beside() -> None:
    placed = plan(
        pools({"num_workers": 2, **GPU}, rollout={"num_workers": 2, **GPU, **SHARED}, reference={**GPU}),
        nodes((8, 2), (8, 1)),
    )
    assert layout(placed) == {"policy": "aa", "rollout": "aa", "reference": "b"}


def test_without_gpus_the_pools_share_cpus_in_time() -> None:
    placed = plan(pools({"num_workers": 2}, rollout={"num_workers": 3, **SHARED}), nodes((8, 0)))
    assert on(placed, "rollout") == [(0,), (1,), (0,)]
    assert [bundle.room for bundle in placed.bundles["policy"]] == [2.0, 1.0]


SHORT: dict[str, tuple[ClusterSpec, dict[str, PoolConfig], str]] = {
    "GPUs": (
        uniform(1, 64.0, 3),
        pools({"num_workers": 4, **GPU}, rollout={"num_workers": 2, "gpus_per_worker": 2, **SHARED}),
        "pool 'policy', with 'rollout' on its workers, needs 2 groups of 2 workers on one node x 2 GPUs; 1 group of 2 "
        "workers on one node fits (node-0 1); 2 GPUs are missing: add a node with 2 free GPUs, or set "
        "pools.policy.num_workers=2",
    ),
    "CPUs of the guests": (
        uniform(1, 8.0, 2),
        pools({"num_workers": 2, **GPU}, rollout={"num_workers": 2, **GPU, "cpus_per_worker": 4.0, **SHARED}),
        "pool 'policy', with 'rollout' on its workers, needs 2 workers x 5 CPUs; 1 worker fits",
    ),
}


@pytest.mark.parametrize(("cluster", "shared", "message"), SHORT.values(), ids=SHORT.keys())
def test_what_is_missing_is_told_of_those_who_share(
    cluster: ClusterSpec, shared: dict[str, PoolConfig], message: str
) -> None:
    with pytest.raises(PlacementError) as refusal:
        plan(shared, cluster)
    assert message in str(refusal.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the policy itself": ({"policy": SHARED}, "policy.colocate_with: the policy's GPUs are those that others share"),
    "no such pool": (
        {"rollout": {"colocate_with": "polcy"}},
        "rollout.colocate_with: there is no pool 'polcy', and only the policy's GPUs can be shared; set "
        "pools.rollout.colocate_with to policy",
    ),
    "another pool": (
        {"rollout": {"colocate_with": "reference"}},
        "rollout.colocate_with: only the policy's GPUs can be shared",
    ),
    "a range of replicas": (
        {"rollout": {**SHARED, "max_workers": 2}},
        "rollout.colocate_with: replicas that come and go need places of their own",
    ),
    "a place of its own": (
        {"rollout": {**SHARED, "node_resource": "fast"}},
        "rollout.node_resource: its workers lie where the policy's do; set pools.policy.node_resource instead",
    ),
    "spread": ({"reference": {**SHARED, "strategy": "spread"}}, "reference.strategy: its workers lie where"),
    "without a GPU beside GPUs": (
        {"policy": GPU, "rollout": SHARED},
        "rollout.gpus_per_worker: 0, but the policy's workers have GPUs for it to share; set "
        "pools.rollout.gpus_per_worker to 1 or more",
    ),
    "GPUs where there are none": (
        {"rollout": {**GPU, **SHARED}},
        "rollout.gpus_per_worker: 1, but the policy's workers have no GPUs to share",
    ),
    "uneven": (
        {"policy": {"num_workers": 3, **GPU}, "rollout": {"gpus_per_worker": 2, **SHARED}},
        "rollout.gpus_per_worker: 2 does not divide the policy's 3 x 1 GPUs evenly; set pools.policy.num_workers to a "
        "multiple of 2, or pools.rollout.gpus_per_worker to 1",
    ),
    "too many": (
        {"policy": {"num_workers": 4, **GPU}, "rollout": {"num_workers": 3, "gpus_per_worker": 2, **SHARED}},
        "rollout.num_workers: 3 workers on 2 of the policy's each need 6, and there are 4; set "
        "pools.rollout.num_workers to 2, or raise pools.policy.num_workers",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_pools_that_cannot_share_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        PoolsConfig.model_validate(config)
    assert message in str(refusal.value)


def test_who_lies_on_a_machine_that_is_gone_is_not_given_gpus_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray moves the bundle, and which GPUs it has there nobody can ask for."""
    placed = plan(
        pools({"num_workers": 4, **GPU}, rollout={"num_workers": 2, "gpus_per_worker": 2, **SHARED}),
        uniform(1, 32.0, 4),
    )
    places = {worker: Place("n0", (str(7 - worker),)) for worker in range(4)}
    nodes_now = {worker: "n0" if worker < 3 else "n1" for worker in range(4)}
    monkeypatch.setattr(
        "placement.shared.placement_group_table", lambda group: {"bundles_to_node_id": {0: nodes_now[group]}}
    )
    groups: Any = range(4)
    first, second = placed.bundles["rollout"]
    check_place(first, places, groups)
    assert environment(first, places) == {"CUDA_VISIBLE_DEVICES": "7,6", NODE_ID: "n0"}
    with pytest.raises(
        PlacementError, match="worker 1 lies on the GPUs of the policy's worker 3, whose machine is gone"
    ):
        check_place(second, places, groups)
