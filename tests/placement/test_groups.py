"""Reservation on a real local Ray that believes in eight GPUs."""

import os
import time
from collections.abc import Iterator

import pytest
import ray

from placement.cluster import from_ray
from placement.config import PoolConfig, PoolsConfig, RolloutPoolConfig
from placement.elastic import Place
from placement.groups import Singly, reserve
from placement.plan import PlacementError, plan
from tests.prove import ONLY_PROVE

pytestmark = pytest.mark.cluster

POOLS = {
    "policy": PoolConfig(num_workers=2, gpus_per_worker=1, cpus_per_worker=0.5),
    "reward": PoolConfig(cpus_per_worker=0.25),
    "rollout": PoolConfig(num_workers=2, gpus_per_worker=2, cpus_per_worker=1, strategy="spread", node_resource="fast"),
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, num_gpus=8, resources={"fast": 1}, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
class Worker:
    def gpus(self) -> list[int]:
        return ray.get_gpu_ids()


def free(kind: str) -> float:
    return ray.available_resources().get(kind, 0.0)


def wait_until_free(kind: str, amount: float) -> None:
    """Ray gives bundles back in the background."""
    deadline = time.monotonic() + 10
    while free(kind) != amount and time.monotonic() < deadline:
        time.sleep(0.05)
    assert free(kind) == amount


def test_each_worker_gets_its_own_gpus_and_release_returns_them() -> None:
    pools = reserve(plan(POOLS, from_ray(ray.nodes())), timeout_s=30)
    wait_until_free("GPU", 2.0)
    assert free("CPU") == 0.75
    assert free("fast") == pytest.approx(0.998)
    workers = [
        Worker.options(**pools.options(pool, worker)).remote()
        for pool, config in POOLS.items()
        for worker in range(config.num_workers)
    ]
    owned = ray.get([worker.gpus.remote() for worker in workers], timeout=60)
    assert [len(gpus) for gpus in owned] == [1, 1, 0, 2, 2]
    assert len({gpu for gpus in owned for gpu in gpus}) == 6
    pools.release()
    wait_until_free("GPU", 8.0)
    wait_until_free("CPU", 4.0)


@ray.remote
class Guest:
    def gpus(self) -> tuple[list[int], str]:
        return ray.get_gpu_ids(), os.environ["CUDA_VISIBLE_DEVICES"]


def test_whoever_shares_the_policys_gpus_sees_them_and_takes_none() -> None:
    """Also one that is built again, and when the ranks are."""
    shares = {"cpus_per_worker": 0.25, "colocate_with": "policy"}
    config = PoolsConfig(
        policy=PoolConfig(num_workers=4, gpus_per_worker=1, cpus_per_worker=0.25),
        rollout=RolloutPoolConfig(num_workers=2, gpus_per_worker=2, **shares),
        reference=PoolConfig(num_workers=1, gpus_per_worker=1, **shares),
    )
    used = {"rollout": config.rollout, "policy": config.policy, "reference": config.reference}
    pools = reserve(plan(used, from_ray(ray.nodes())), timeout_s=30)
    wait_until_free("GPU", 4.0)
    assert free("CPU") == 4 - 7 * 0.25
    ranks: list[list[int]] = []
    for _ in range(2):
        workers = [Worker.options(**pools.options("policy", rank)).remote() for rank in range(4)]
        owned = ray.get([worker.gpus.remote() for worker in workers], timeout=60)
        guests = [("rollout", 0), ("rollout", 1), ("reference", 0)]
        actors = [Guest.options(**pools.options(pool, number)).remote() for pool, number in guests]
        seen = ray.get([actor.gpus.remote() for actor in actors], timeout=60)
        (first,), (second,), (third,), (fourth,) = owned
        assert seen == [([], f"{first},{second}"), ([], f"{third},{fourth}"), ([], f"{first}")]
        assert ranks in ([], owned), "a bundle keeps its GPUs"
        ranks = owned
        for actor in (*workers, *actors):
            ray.kill(actor)
    pools.release()
    wait_until_free("GPU", 8.0)


def test_a_pool_that_does_not_fit_in_time_is_named_and_nothing_stays_reserved() -> None:
    first = reserve(plan({"rollout": POOLS["rollout"]}, from_ray(ray.nodes())), timeout_s=30)
    second = plan(
        {"policy": PoolConfig(gpus_per_worker=2), "reference": PoolConfig(gpus_per_worker=3)}, from_ray(ray.nodes())
    )
    started = time.monotonic()
    with pytest.raises(PlacementError, match=r"within 1 s: pool 'policy' \(1 x 2 GPUs and 1 CPUs\); .* of 8 GPUs"):
        reserve(second, timeout_s=1)
    assert 1 <= time.monotonic() - started < 5
    wait_until_free("GPU", 4.0)
    first.release()
    wait_until_free("GPU", 8.0)
    reserve(second, timeout_s=10).release()
    wait_until_free("GPU", 8.0)


@ONLY_PROVE
def test_workers_that_come_and_go_have_seats_of_their_own() -> None:
    """Four of two GPUs fill the eight; a fifth waits until one is given back."""
    pool = PoolConfig(num_workers=2, gpus_per_worker=2, cpus_per_worker=0.1)
    pools = reserve(plan({"rollout": pool}, from_ray(ray.nodes())), timeout_s=30, singly={"rollout": Singly(2, 5)})
    seats = pools.seats["rollout"]
    assert [seat.place for seat in seats.look()] == [Place.GRANTED] * 4 + [Place.ASKED]
    assert len({seat.node for seat in seats.look()[:4]}) == 1
    worker = Worker.options(**pools.options("rollout", 3)).remote()
    assert len(ray.get(worker.gpus.remote(), timeout=60)) == 2
    seats.give_back(1)
    deadline = time.monotonic() + 10
    while seats.look()[-1].place is not Place.GRANTED and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [(seat.number, seat.place) for seat in seats.look()] == [(n, Place.GRANTED) for n in (0, 2, 3, 4)]
    assert seats.ask() == 5, "a number is never used again"
    pools.release()
    wait_until_free("GPU", 8.0)
