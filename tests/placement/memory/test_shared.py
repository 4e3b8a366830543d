"""A shared GPU holds the sum at the worse of two moments, by hand calculation; a fix that is named makes it fit."""

from dataclasses import replace
from typing import Any

import pytest

from placement.memory.fit import MemoryShortageError, total
from placement.memory.footprint import GB, RolloutLoad, policy_footprint, rollout_footprint
from placement.memory.shared import ASLEEP, COMPUTES, SAMPLE, SharedLoad, check_shared, moments
from tests.placement.memory.test_footprint import SEVEN, load

ENGINE = RolloutLoad(tensor_parallel=1, bytes_per_weight=2, utilization=0.7, max_num_seqs=64, context=4096)


def shared(**more: Any) -> SharedLoad:
    return SharedLoad(**({"shape": SEVEN, "policy": load(), "rollout": ENGINE} | more))


def test_an_engine_that_sleeps_holds_neither_weights_nor_cache() -> None:
    found = moments(shared(), 80 * GB)
    policy = policy_footprint(SEVEN, load())
    assert found[COMPUTES] == {"policy": total(policy), "rollout": ASLEEP}
    lasting = policy["weights"] + policy["gradients"] + policy["optimizer"] + policy["buffers"]
    assert found[SAMPLE] == {"policy": lasting, "rollout": pytest.approx(0.7 * 80 * GB)}
    assert lasting < total(policy)


def test_a_version_that_waits_in_device_memory_is_there_at_both() -> None:
    found = moments(shared(rollout=replace(ENGINE, staged=5 * GB)), 80 * GB)
    assert found[COMPUTES]["rollout"] == ASLEEP + 5 * GB
    assert found[SAMPLE]["rollout"] == pytest.approx((0.7 * 80 + 5) * GB)


def test_others_are_there_at_both() -> None:
    others = {"reference": 15 * GB}
    assert all(pools["reference"] == 15 * GB for pools in moments(shared(others=others), 80 * GB).values())
    assert moments(shared(rollout=None, others=others), None) == {
        COMPUTES: {"policy": total(policy_footprint(SEVEN, load())), **others}
    }


def test_with_an_unknown_gpu_the_cache_is_what_all_sequences_would_fill() -> None:
    assert moments(shared(), None)[SAMPLE]["rollout"] == total(rollout_footprint(SEVEN, ENGINE, None))


def test_engines_that_take_too_much_are_told_how_much_they_may() -> None:
    check_shared(shared(), 80 * GB, 4096)
    greedy = shared(rollout=replace(ENGINE, utilization=0.9))
    with pytest.raises(MemoryShortageError, match=r"while replicas sample.*set rollout.gpu_memory_utilization=0.\d+,"):
        check_shared(greedy, 80 * GB, 4096)
    lasting = moments(greedy, 80 * GB)[SAMPLE]["policy"]
    share = int(100 * (80 * GB - lasting) / (80 * GB)) / 100
    check_shared(shared(rollout=replace(ENGINE, utilization=share)), 80 * GB, 4096)
    with pytest.raises(MemoryShortageError):
        check_shared(shared(rollout=replace(ENGINE, utilization=share + 0.01)), 80 * GB, 4096)


def test_a_step_that_takes_too_much_is_told_what_makes_it_smaller() -> None:
    wide = shared(policy=load(gradient_checkpointing=False, tokens=16384))
    needs = sum(moments(wide, 80 * GB)[COMPUTES].values())
    with pytest.raises(MemoryShortageError, match=r"while the policy computes.*policy.gradient_checkpointing=true"):
        check_shared(wide, needs - 1, 4096)


def test_where_nothing_helps_they_are_told_to_part() -> None:
    with pytest.raises(MemoryShortageError, match="set no colocate_with, so that they have GPUs of their own"):
        check_shared(shared(others={"reference": 100 * GB}), 80 * GB, 4096)
