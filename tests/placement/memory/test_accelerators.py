"""A GPU has less memory than it is sold with, and the plan counts what it has."""

import pytest

from placement.cluster import NodeSpec
from placement.memory.accelerators import MEMORY_GB, gpu_memory_gb

SOLD = {
    "A10G": 24, "A100-40G": 40, "A100-80G": 80, "B200": 180, "H100": 80, "H20": 96, "H200": 141, "L4": 24,
    "L40S": 48, "T4": 16,
}  # fmt: skip


def node(*accelerators: str) -> NodeSpec:
    return NodeSpec("n", 8.0, 1, {f"accelerator_type:{name}": 1.0 for name in accelerators})


@pytest.mark.parametrize("name", SOLD)
def test_what_a_gpu_is_sold_with_does_not_fit(name: str) -> None:
    has = gpu_memory_gb(node(name))
    assert has is not None
    assert 0.9 * SOLD[name] < has < SOLD[name]


@pytest.mark.parametrize(("name", "gigabytes"), [("A10G", 22.5), ("L4", 22.5), ("L40S", 45.0), ("T4", 15.0)])
def test_error_correction_takes_a_sixteenth_of_gddr(name: str, gigabytes: float) -> None:
    assert gpu_memory_gb(node(name)) == gigabytes
    assert gigabytes == SOLD[name] * 15 / 16


def test_every_kind_is_held_against_what_is_sold() -> None:
    assert MEMORY_GB.keys() == SOLD.keys()


def test_the_smallest_of_a_node_counts_and_an_unknown_one_makes_it_unknown() -> None:
    assert gpu_memory_gb(node("H100", "L4")) == 22.5
    assert gpu_memory_gb(node("H100", "X9")) is None
