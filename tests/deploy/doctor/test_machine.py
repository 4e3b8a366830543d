"""A machine that is too small for its workers is told, with what to give it."""

from dataclasses import replace

import pytest

from deploy.doctor.machine import (
    GB,
    Machine,
    check_limits,
    check_memory,
    check_ports,
    check_same,
    check_shm,
    num_ports,
    object_store_bytes,
    this_machine,
)

LARGE = Machine(
    host="node-0",
    packages={"python": "3.11.7", "ray": "2.60.0"},
    memory=1000.0 * GB,
    shm_free=500.0 * GB,
    files=1_000_000,
    tasks=None,
    ports=1000,
)


def test_a_large_machine_passes() -> None:
    findings = [
        check_shm(LARGE, 8),
        check_limits(LARGE, 16),
        check_ports(LARGE, 200),
        check_memory(LARGE, 100.0 * GB),
        check_same(LARGE, LARGE),
    ]
    assert [finding.level for finding in findings] == ["pass"] * 5


def test_this_machine_is_looked_at() -> None:
    here = this_machine(10)
    assert here.memory > GB
    assert here.files >= 256
    assert here.ports == 10
    assert here.tasks is None or here.tasks > 0
    assert here.packages["ray"] is not None


@pytest.mark.parametrize(
    ("shm_gb", "level"),
    [(0.0625, "fail"), (3.9, "fail"), (4.1, "warn"), (33.0, "warn"), (35.0, "pass")],
)
def test_shared_memory_is_enough_for_engines_and_for_rays_objects(shm_gb: float, level: str) -> None:
    """64 MB are what a container has when nobody says more; 8 engines need 4 GB, and Ray's store 30 of the 100."""
    small = replace(LARGE, memory=100.0 * GB, shm_free=shm_gb * GB)
    found = check_shm(small, 8)
    assert found.level == level
    assert level == "pass" or "--shm-size" in found.fix


@pytest.mark.parametrize(
    ("memory", "shm_free", "store"),
    [(100e9, 500e9, 30e9), (100e9, 20e9, 19e9), (100e9, 1e9, 10e9), (2e12, 1e12, 200e9)],
)
def test_rays_object_store_is_as_large_as_ray_makes_it(memory: float, shm_free: float, store: float) -> None:
    assert object_store_bytes(memory, shm_free) == pytest.approx(store)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": 1024}, "a process may open 1024 files"),
        ({"tasks": 500}, "500 more processes and threads are allowed"),
    ],
)
def test_limits_that_are_low_are_named(changes: dict[str, int], said: str) -> None:
    found = check_limits(replace(LARGE, **changes), 4)  # type: ignore[arg-type]
    assert found.level == "warn"
    assert said in found.text
    assert "ulimit" in found.fix


def test_ports_that_cannot_be_opened_are_counted() -> None:
    wanted = num_ports(4)
    assert check_ports(replace(LARGE, ports=wanted), wanted).level == "pass"
    assert f"{wanted - 1} of {wanted} ports" in check_ports(replace(LARGE, ports=wanted - 1), wanted).text


@pytest.mark.parametrize(("needed_gb", "level"), [(700.0, "pass"), (900.0, "warn"), (1100.0, "fail"), (None, "skip")])
def test_the_hosts_memory_holds_what_its_workers_need(needed_gb: float | None, level: str) -> None:
    assert check_memory(LARGE, None if needed_gb is None else needed_gb * GB).level == level


def test_a_node_with_other_packages_is_named() -> None:
    other = replace(LARGE, host="node-7", packages={"python": "3.11.7", "ray": None})
    found = check_same(other, LARGE)
    assert found.level == "fail"
    assert found.text == "node-7: ray missing (here 2.60.0)"
