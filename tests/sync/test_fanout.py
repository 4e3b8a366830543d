"""The closed form is what the tree does in virtual time, keeps its bounds, and chooses what a link would choose."""

from math import ceil, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.config import SyncConfig
from sync.fanout import (
    SLICE_BYTES,
    Link,
    Load,
    Tree,
    choose,
    cut,
    fanout_of,
    group_tree,
    relative_time,
    relay_tree,
    time_of,
)
from sync.simulated import simulated_time

BUCKET = 64 * 2**20
LARGE = 15 * 10**9


def tree_of(world_size: int, fanout: int | None) -> Tree:
    return group_tree(world_size) if fanout is None else relay_tree(world_size, fanout)


fanouts = st.one_of(st.none(), st.integers(1, 8))
latencies = st.one_of(st.just(0.0), st.floats(0.01, 10.0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 13, 32, 100])
@pytest.mark.parametrize("fanout", [None, 1, 2, 3, 7])
def test_every_rank_has_one_parent_before_it(world_size: int, fanout: int | None) -> None:
    tree = tree_of(world_size, fanout)
    edges = [(rank, child) for rank, children in enumerate(tree) for child in children]
    assert sorted(child for _, child in edges) == list(range(1, world_size))
    assert all(rank < child for rank, child in edges)
    copies = max(map(len, tree))
    assert copies == (ceil(log2(world_size)) if fanout is None else min(fanout, world_size - 1))


@given(st.integers(2, 40), fanouts, st.integers(1, 40), latencies)
def test_in_one_run_the_closed_form_is_exact(size: int, fanout: int | None, messages: int, latency: float) -> None:
    tree, load, link = tree_of(size, fanout), Load(messages, 3.0, messages), Link(latency, 2.0)
    assert time_of(tree, load, link) == pytest.approx(simulated_time(tree, load, link), rel=1e-9)


@given(st.integers(2, 40), fanouts, st.sampled_from([(40, 1), (160, 16), (80, 4)]), latencies)
def test_in_several_runs_it_is_near(size: int, fanout: int | None, runs: tuple[int, int], latency: float) -> None:
    tree, load, link = tree_of(size, fanout), Load(runs[0], 3.0, runs[1]), Link(latency, 2.0)
    assert time_of(tree, load, link) == pytest.approx(simulated_time(tree, load, link), rel=0.1)


@given(st.integers(1, 60), st.integers(1, 60), latencies)
def test_a_chain_takes_what_a_pipeline_takes(workers: int, messages: int, latency: float) -> None:
    time = time_of(relay_tree(workers + 1, 1), Load(messages, 1.0, messages), Link(latency))
    assert time == pytest.approx(messages * (1 + (workers - 1) / messages) + (messages + workers - 1) * latency)


@given(st.integers(2, 40), fanouts, st.integers(1, 30), st.integers(1, 8), latencies)
def test_the_bounds_hold(size: int, fanout: int | None, runs: int, per_run: int, latency: float) -> None:
    tree, load = tree_of(size, fanout), Load(runs * per_run, 1.0, per_run)
    copies = max(map(len, tree))
    time = simulated_time(tree, load, Link(latency))
    slack = 1e-9 * time
    assert time >= load.num_messages + latency - slack
    assert time >= copies * load.num_messages + latency - slack


@given(st.integers(3, 60), st.integers(2, 5), st.integers(1, 60), st.floats(0.0, 1.0))
def test_a_tree_is_at_most_what_is_said(size: int, fanout: int, messages: int, share: float) -> None:
    depth, above = 0, size - 1
    while above:
        depth, above = depth + 1, (above - 1) // fanout
    latency = share * (fanout - 1)
    time = simulated_time(relay_tree(size, fanout), Load(messages, 1.0, messages), Link(latency))
    assert time <= (fanout * messages + fanout * (depth - 1) + depth * latency) * (1 + 1e-9)


def test_a_thousand_workers_have_it_in_about_twice_the_bound() -> None:
    workers = [f"machine {index}" for index in range(1025)]
    assert choose(workers, LARGE, BUCKET) == 2
    assert relative_time(workers, LARGE, BUCKET, 2) < 2.2
    assert 11.0 < relative_time(workers, LARGE, BUCKET, None) < 11.1


def test_a_version_is_cut_into_whole_runs() -> None:
    assert cut(10 * BUCKET, BUCKET, SLICE_BYTES) == Load(160, SLICE_BYTES, 16)
    assert cut(10 * BUCKET, BUCKET, BUCKET) == Load(10, BUCKET, 1)
    assert cut(1000, BUCKET, SLICE_BYTES) == Load(1, 1000, 1)


@pytest.mark.parametrize(
    ("machines", "num_bytes", "fanout"),
    [
        (["a"] * 9, LARGE, None),  # no link in between
        (["a", "b"], LARGE, None),  # one copy either way
        (["a", "b", "b"], LARGE, 1),  # the second worker has it from the first, and no link is asked for it
        (["a", *"bcdefghi"], LARGE, 1),
        (["a", *(f"node {index}" for index in range(64))], BUCKET, 2),  # a chain of 64 would be longer than the bucket
        (["a", *(f"node {index // 8}" for index in range(1024))], LARGE, 1),  # only one of eight hops leaves a machine
    ],
)
def test_what_auto_chooses(machines: list[str], num_bytes: int, fanout: int | None) -> None:
    assert fanout_of(SyncConfig(), machines, num_bytes) == fanout


def test_what_is_written_is_what_is_used() -> None:
    assert fanout_of(SyncConfig(fanout=3), ["a"] * 9, None) == 3
    assert fanout_of(SyncConfig(fanout=None), [*"abcdefghi"], LARGE) is None
    assert fanout_of(SyncConfig(transport="nccl"), [*"abcdefghi"], LARGE) is None
    assert fanout_of(SyncConfig(), [*"abcdefghi"], None) == fanout_of(SyncConfig(), [*"abcdefghi"], BUCKET)


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "fast", [2]])
def test_what_is_no_fanout_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="fanout: write auto, null"):
        SyncConfig.model_validate({"fanout": given})


def test_nccl_has_no_fanout() -> None:
    with pytest.raises(ValueError, match="fanout: 2, but nccl passes its broadcast on"):
        SyncConfig(transport="nccl", fanout=2)
