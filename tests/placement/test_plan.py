"""Plans that must exist, plans that must not, and what is said then."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from placement.cluster import ClusterSpec, NodeSpec, from_ray, this_machine, uniform
from placement.config import PoolConfig
from placement.plan import PlacementError, PlacementPlan, plan


def pool(
    num_workers: int = 1,
    gpus: int = 0,
    cpus: float = 1.0,
    spread: bool = False,
    on: str | None = None,
    bears: str = "",
) -> PoolConfig:
    """`bears`: labels, as `tier=train,rack=1`."""
    return PoolConfig(
        num_workers=num_workers,
        gpus_per_worker=gpus,
        cpus_per_worker=cpus,
        strategy="spread" if spread else "pack",
        node_resource=on,
        node_labels=labels(bears),
    )


def labels(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split(",") if pair)


def nodes(*sizes: tuple[float, int], **resources: str) -> ClusterSpec:
    """Nodes a, b, c ... of (CPUs, GPUs); `x="ab"` lets nodes a and b offer the resource x."""
    names = "abcdefgh"[: len(sizes)]
    return ClusterSpec(
        tuple(
            NodeSpec(name, cpus, gpus, {key: 1.0 for key, offering in resources.items() if name in offering})
            for name, (cpus, gpus) in zip(names, sizes, strict=True)
        )
    )


def labelled(cluster: ClusterSpec, *texts: str) -> ClusterSpec:
    """The same nodes with these labels."""
    each = zip(cluster.nodes, texts, strict=True)
    return ClusterSpec(tuple(replace(node, labels=labels(text)) for node, text in each))


def layout(placed: PlacementPlan) -> dict[str, str]:
    """The node of each worker, as one string for each pool."""
    return {name: "".join(bundle.node for bundle in bundles) for name, bundles in placed.bundles.items()}


FITS = {
    "one worker on one CPU": (nodes((1, 0)), {"policy": pool()}, {"policy": "a"}),
    "fractions that binary floats cannot add": (
        nodes((0.3, 0)),
        {"policy": pool(cpus=0.1), "reward": pool(2, cpus=0.1)},
        {"policy": "a", "reward": "aa"},
    ),
    "thirty tenths make three": (nodes((3, 0)), {"reward": pool(30, cpus=0.1)}, {"reward": "a" * 30}),
    "the demo on two cores": (
        nodes((2, 0)),
        {"policy": pool(cpus=0.5), "reward": pool(cpus=0.25), "rollout": pool(cpus=1)},
        {"policy": "a", "reward": "a", "rollout": "a"},
    ),
    "pack keeps a pool on one node": (nodes((8, 4), (8, 4)), {"policy": pool(4, 1)}, {"policy": "aaaa"}),
    "pack prefers the node that holds the whole pool": (
        nodes((8, 2), (8, 4)),
        {"policy": pool(4, 1)},
        {"policy": "bbbb"},
    ),
    "pack fills the fullest node that will do": (nodes((8, 8), (8, 4)), {"policy": pool(4, 1)}, {"policy": "bbbb"}),
    "pack goes on when a node is full": (nodes((8, 2), (8, 2)), {"policy": pool(3, 1)}, {"policy": "aab"}),
    "spread takes turns": (nodes((8, 4), (8, 4)), {"rollout": pool(4, 1, spread=True)}, {"rollout": "abab"}),
    "spread takes the least loaded": (
        nodes((8, 4), (8, 4)),
        {"policy": pool(1, 2), "rollout": pool(2, 1, spread=True)},
        {"policy": "a", "rollout": "ba"},
    ),
    "spread without GPUs goes by CPUs": (nodes((2, 8), (4, 0)), {"reward": pool(2, spread=True)}, {"reward": "ba"}),
    "pools without GPUs leave the GPU nodes alone": (nodes((8, 8), (8, 0)), {"reward": pool(2)}, {"reward": "bb"}),
    "the most demanding pool chooses first": (
        nodes((8, 4), (8, 4)),
        {"rollout": pool(4, 1, spread=True), "policy": pool(1, 4)},
        {"rollout": "bbbb", "policy": "a"},
    ),
    "a worker never spans nodes, small ones fill the rest": (
        nodes((8, 3), (8, 3)),
        {"policy": pool(2, 2), "rollout": pool(2, 1)},
        {"policy": "ab", "rollout": "ab"},
    ),
    "a custom resource binds": (nodes((8, 4), (8, 4), h="b"), {"policy": pool(2, 1, on="h")}, {"policy": "bb"}),
    "whoever has fewer nodes to choose from goes first": (
        nodes((8, 1), (8, 1), h="a"),
        {"policy": pool(1, 1), "rollout": pool(1, 1, on="h")},
        {"policy": "b", "rollout": "a"},
    ),
    "a first choice is taken back where it blocks": (
        nodes((8, 2), (8, 3), h="a"),
        {"policy": pool(1, 2), "rollout": pool(2, 1, on="h")},
        {"policy": "b", "rollout": "aa"},
    ),
    "CPUs bind too": (
        nodes((4, 8), (16, 8)),
        {"policy": pool(4, 1, cpus=4.0)},
        {"policy": "bbbb"},
    ),
    "a label binds": (
        labelled(nodes((8, 4), (8, 4), (8, 4)), "tier=serve", "tier=train", ""),
        {"policy": pool(2, 1, bears="tier=train"), "rollout": pool(2, 1, bears="tier=serve")},
        {"policy": "bb", "rollout": "aa"},
    ),
    "of several labels a node bears all": (
        labelled(nodes((8, 4), (8, 4), (8, 4)), "tier=train", "rack=1", "rack=1,tier=train,zone=x"),
        {"policy": pool(2, 1, bears="tier=train,rack=1")},
        {"policy": "cc"},
    ),
    "a label and a resource bind together": (
        labelled(nodes((8, 4), (8, 4), (8, 4), h="ab"), "tier=serve", "tier=train", "tier=train"),
        {"policy": pool(2, 1, on="h", bears="tier=train")},
        {"policy": "bb"},
    ),
    "whoever is bound by a label chooses before those that are not": (
        labelled(nodes((8, 1), (8, 1)), "tier=train", ""),
        {"rollout": pool(1, 1), "policy": pool(1, 1, bears="tier=train")},
        {"rollout": "b", "policy": "a"},
    ),
    "nodes that differ in labels alone are not interchangeable": (
        labelled(nodes((8, 2), (8, 2), (8, 2)), "", "", "tier=train"),
        {"policy": pool(2, 2), "rollout": pool(2, 1, bears="tier=train")},
        {"policy": "ab", "rollout": "cc"},
    ),
    "no pools": (nodes((1, 0)), {}, {}),
    "all GPUs in use": (
        nodes((8, 8), (8, 8)),
        {"policy": pool(8, 1), "rollout": pool(2, 4)},
        {"policy": "b" * 8, "rollout": "aa"},
    ),
}


@pytest.mark.parametrize(("cluster", "pools", "expected"), FITS.values(), ids=FITS.keys())
def test_pools_that_fit_lie_where_they_should(
    cluster: ClusterSpec, pools: dict[str, PoolConfig], expected: dict[str, str]
) -> None:
    placed = plan(pools, cluster)
    assert layout(placed) == expected
    check(placed, pools, cluster)


def check(placed: PlacementPlan, pools: dict[str, PoolConfig], cluster: ClusterSpec) -> None:
    """The invariants of every plan."""
    assert list(placed.bundles) == list(pools)
    specs = {node.name: node for node in cluster.nodes}
    gpus: Counter[str] = Counter()
    ten_thousandths: Counter[str] = Counter()
    for name, bundles in placed.bundles.items():
        assert [bundle.worker for bundle in bundles] == list(range(pools[name].num_workers))
        for bundle in bundles:
            assert (bundle.pool, bundle.gpus, bundle.cpus) == (
                name,
                pools[name].gpus_per_worker,
                pools[name].cpus_per_worker,
            )
            assert bundle.resource is None or specs[bundle.node].resources[bundle.resource] > 0
            gpus[bundle.node] += bundle.gpus
            ten_thousandths[bundle.node] += round(bundle.cpus * 10_000)
    for name, node in specs.items():
        assert gpus[name] <= node.gpus
        assert ten_thousandths[name] <= round(node.cpus * 10_000)


LACKS = {
    "too few GPUs": (
        nodes((8, 4), (8, 3)),
        {"rollout": pool(4, 2)},
        "pool 'rollout' needs 4 workers x 2 GPUs; 3 workers fit (a 2, b 1); 2 GPUs are missing: "
        "add a node with 2 free GPUs, or set pools.rollout.num_workers=3",
    ),
    "several workers short": (
        nodes((8, 2)),
        {"rollout": pool(4, 1)},
        "pool 'rollout' needs 4 workers x 1 GPU; 2 workers fit (a 2); 2 GPUs are missing: "
        "add nodes with 2 free GPUs (1 GPU on one node for each worker), or set pools.rollout.num_workers=2",
    ),
    "another pool has them": (
        nodes((8, 8)),
        {"policy": pool(1, 8), "rollout": pool(1, 1)},
        "pool 'rollout' needs 1 worker x 1 GPU; no worker fits; 'policy' holds 8 GPUs; 1 GPU is missing: "
        "add a node with 1 free GPU, or lower pools.policy.num_workers",
    ),
    "larger than any node": (
        nodes((8, 4), (8, 4)),
        {"rollout": pool(1, 8)},
        "pool 'rollout' needs 1 worker x 8 GPUs; no worker fits; 8 GPUs are missing: "
        "add a node with 8 free GPUs, or set pools.rollout.gpus_per_worker=4, all that the largest node has",
    ),
    "no GPU at all": (
        nodes((8, 0)),
        {"rollout": pool(1, 1)},
        "pool 'rollout' needs 1 worker x 1 GPU; no worker fits; 1 GPU is missing: add a node with 1 free GPU",
    ),
    "too few CPUs": (
        nodes((2, 0)),
        {"policy": pool(cpus=1.5), "rollout": pool(cpus=1.0)},
        "pool 'rollout' needs 1 worker x 1 CPU; no worker fits; 'policy' holds 1.5 CPUs; 1 CPU is missing: "
        "add a node with 1 free CPU, or lower pools.policy.num_workers, or lower cpus_per_worker, "
        "which reserves a share and limits nothing",
    ),
    "CPUs short on the GPU nodes": (
        nodes((1, 8), (64, 0)),
        {"policy": pool(8, 1, cpus=0.25)},
        "pool 'policy' needs 8 workers x 1 GPU; 4 workers fit (a 4); 4 GPUs are missing",
    ),
    "CPUs short where there are GPUs": (
        nodes((1, 8)),
        {"policy": pool(8, 1, cpus=0.25)},
        "pool 'policy' needs 8 workers x 0.25 CPUs; 4 workers fit (a 4); 1 CPU is missing",
    ),
    "more CPUs than any node": (
        nodes((4, 0)),
        {"policy": pool(cpus=8.0)},
        "or set pools.policy.cpus_per_worker=4, all that the largest node has",
    ),
    "a hair too much": (nodes((0.3, 0)), {"policy": pool(3, cpus=0.1001)}, "2 workers fit (a 2)"),
    "nobody offers the resource": (
        nodes((8, 4)),
        {"policy": pool(1, 1, on="h100")},
        "pool 'policy' needs nodes with the custom resource 'h100', and no node offers it: start Ray on them with "
        "--resources='{\"h100\": 1}', or remove pools.policy.node_resource",
    ),
    "the nodes of the resource are full": (
        nodes((8, 2), (8, 8), h="a"),
        {"policy": pool(3, 1, on="h")},
        "pool 'policy' needs 3 workers x 1 GPU; 2 workers fit (a 2); 1 GPU is missing",
    ),
    "nobody bears the label": (
        labelled(nodes((8, 4), (8, 4)), "", "tier=serve"),
        {"policy": pool(1, 1, bears="tier=train")},
        "pool 'policy' needs nodes with the label tier=train, and no node has it (there is tier=serve): start Ray on "
        "them with --labels=tier=train, or remove pools.policy.node_labels",
    ),
    "nobody bears all labels": (
        labelled(nodes((8, 4), (8, 4)), "tier=train", "rack=1"),
        {"policy": pool(1, 1, bears="tier=train,rack=1")},
        "with the labels tier=train,rack=1, and no node has all of them (there is rack=1, tier=train): start Ray",
    ),
    "the label is on nodes without the resource": (
        labelled(nodes((8, 4), (8, 4), h="a"), "", "tier=train"),
        {"policy": pool(1, 1, on="h", bears="tier=train")},
        "with the label tier=train, and no node with 'h' has it: start Ray",
    ),
    "the nodes with the label are full": (
        labelled(nodes((8, 2), (8, 8)), "tier=train", ""),
        {"policy": pool(3, 1, bears="tier=train")},
        "pool 'policy' needs 3 workers x 1 GPU; 2 workers fit (a 2); 1 GPU is missing",
    ),
    "GPUs are not custom": (nodes((8, 2)), {"policy": pool(on="GPU")}, "set pools.policy.gpus_per_worker"),
    "no nodes": (ClusterSpec(()), {"policy": pool()}, "pool 'policy' needs a node, and the cluster has none"),
    "the total fits, the pieces do not": (
        nodes((8, 3), (8, 3)),
        {"rollout": pool(3, 2)},
        "3 workers x 2 GPUs; 2 workers fit (a 1, b 1); 2 GPUs are missing",
    ),
}


@pytest.mark.parametrize(("cluster", "pools", "message"), LACKS.values(), ids=LACKS.keys())
def test_pools_that_do_not_fit_name_what_is_missing(
    cluster: ClusterSpec, pools: dict[str, PoolConfig], message: str
) -> None:
    with pytest.raises(PlacementError) as refusal:
        plan(pools, cluster)
    assert message in str(refusal.value)


def test_a_plan_is_found_iff_one_exists() -> None:
    """Small random cases against exhaustive search."""
    rng = random.Random(0)
    for _ in range(400):
        cluster = nodes(
            *((rng.randint(1, 4), rng.randint(0, 4)) for _ in range(rng.randint(1, 3))), h=rng.choice(["a", "ab", "c"])
        )
        cluster = labelled(cluster, *(rng.choice(["", "tier=x", "tier=y"]) for _ in cluster.nodes))
        pools = {
            name: pool(
                rng.randint(1, 2),
                rng.randint(0, 2),
                rng.choice([0.5, 1.0, 2.0]),
                rng.random() < 0.5,
                rng.choice([None, None, "h"]),
                rng.choice(["", "", "tier=x"]),
            )
            for name in ("policy", "reward", "rollout")
        }
        if exists(pools, cluster):
            placed = plan(pools, cluster)
            check(placed, pools, cluster)
            assert plan(pools, cluster) == placed
        else:
            with pytest.raises(PlacementError):
                plan(pools, cluster)


def exists(pools: dict[str, PoolConfig], cluster: ClusterSpec) -> bool:
    """Whether any assignment of workers to nodes fits, by trying all."""
    workers = [config for config in pools.values() for _ in range(config.num_workers)]

    def place(index: int, left: tuple[tuple[float, int], ...]) -> bool:
        if index == len(workers):
            return True
        config = workers[index]
        for at, (node, (cpus, gpus)) in enumerate(zip(cluster.nodes, left, strict=True)):
            offered = config.node_resource is None or config.node_resource in node.resources
            offered = offered and config.node_labels.items() <= node.labels.items()
            if offered and cpus >= config.cpus_per_worker and gpus >= config.gpus_per_worker:
                rest = (cpus - config.cpus_per_worker, gpus - config.gpus_per_worker)
                if place(index + 1, (*left[:at], rest, *left[at + 1 :])):
                    return True
        return False

    return place(0, tuple((node.cpus, node.gpus) for node in cluster.nodes))


@pytest.mark.timeout(10)
def test_large_clusters_are_planned_at_once() -> None:
    placed = plan({"policy": pool(256, 1), "rollout": pool(64, 4, spread=True)}, uniform(64, 64, 8))
    assert len(placed.bundles["policy"]) == 256
    with pytest.raises(PlacementError, match="1 GPU is missing"):
        plan({"policy": pool(257, 1), "rollout": pool(64, 4, spread=True)}, uniform(64, 64, 8))
    with pytest.raises(PlacementError, match="6 GPUs are missing"):  # half of every node stays free, in vain
        plan({"policy": pool(65, 6), "reward": pool(100, spread=True)}, uniform(64, 64, 10))


def ray_node(
    host: str, node_id: str, resources: dict[str, float], alive: bool = True, bears: str = ""
) -> dict[str, object]:
    known = {"Alive": alive, "NodeID": node_id, "NodeManagerHostname": host, "Resources": resources}
    return {**known, "Labels": labels(bears)}


def test_a_ray_cluster_is_its_living_nodes() -> None:
    cluster = from_ray(
        [
            ray_node(
                "head", "aaaaaaaaaa", {"CPU": 8.0, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0}
            ),
            ray_node("gpu", "bbbbbbbbbb", {"CPU": 64.0, "GPU": 8.0, "h100": 1.0}, bears="tier=train"),
            ray_node("gpu", "cccccccccc", {"GPU": 8.0}),
            ray_node("gone", "dddddddddd", {}, alive=False),
        ]
    )
    assert cluster.nodes == (
        NodeSpec("head", 8.0, 0, {"node:10.0.0.1": 1.0}, {}, "aaaaaaaaaa"),
        NodeSpec("gpu-bbbbbbbb", 64.0, 8, {"h100": 1.0}, {"tier": "train"}, "bbbbbbbbbb"),
        NodeSpec("gpu-cccccccc", 0.0, 8, {}, {}, "cccccccccc"),
    )


def test_this_machine_is_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (node,) = this_machine().nodes
    assert node.cpus >= 1
    assert node.gpus == 0
