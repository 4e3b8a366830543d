"""Whether a plan can be granted at once is told from what is free."""

from placement.cluster import ClusterSpec, NodeSpec
from placement.config import PoolConfig
from placement.live import fits
from placement.plan import plan

POOLS = {
    "policy": PoolConfig(num_workers=2, gpus_per_worker=1, cpus_per_worker=0.3),
    "reward": PoolConfig(num_workers=3, cpus_per_worker=0.1, node_resource="fast"),
}


def cluster(cpus: float = 1.0, gpus: int = 2, fast: float = 1.0) -> ClusterSpec:
    return ClusterSpec((NodeSpec("a", cpus, gpus, {"fast": fast}), NodeSpec("b", 8.0, 8)))


def test_a_plan_fits_iff_every_node_has_what_it_takes() -> None:
    planned = plan(POOLS, ClusterSpec(cluster().nodes[:1]))
    assert fits(planned, cluster())
    assert fits(planned, cluster(cpus=0.9, fast=0.003)), "tenths add up exactly"
    assert not fits(planned, cluster(cpus=0.8999))
    assert not fits(planned, cluster(gpus=1)), "what other nodes have does not count"
    assert not fits(planned, cluster(fast=0.002))
