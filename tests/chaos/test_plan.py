"""Which faults strike, how often, and which of them together."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.chaos.__main__ import batches
from tests.chaos.plan import CLASSES, Scene, choose, plan

QUIET = Scene(in_flight=(), most_in_flight=4, has_trained=True, all_serve=True, num_checkpoints=2, newest_is_new=True)


def test_classes_strike_equally_often_among_their_like() -> None:
    names = plan(1000, 3, restarts=220, vllm=False)
    assert len(names) == 1000
    assert set(names) == {name for name, kind in CLASSES.items() if not kind.colocated}
    assert set(plan(1000, 3, restarts=220, vllm=False, colocated=True)) == set(CLASSES)
    assert sum(CLASSES[name].restarts for name in names) == 220
    assert sum(CLASSES[name].loses_policy for name in names) == 78
    counts = Counter(names)
    for of_a_kind in (lambda kind: kind.restarts, lambda kind: kind.loses_policy):
        mine = [counts[name] for name, kind in CLASSES.items() if of_a_kind(kind)]
        assert max(mine) - min(mine) <= 1
    assert names == plan(1000, 3, restarts=220, vllm=False)
    assert names != plan(1000, 4, restarts=220, vllm=False)


@pytest.mark.parametrize("seed", range(20))
def test_sixty_faults_are_of_many_classes(seed: int) -> None:
    names = plan(60, seed, restarts=8, vllm=False)
    assert len(set(names)) >= 30
    assert {"driver killed", "raylet killed"} <= set(names)


@pytest.mark.parametrize(("only", "count"), [("policy", 8), ("driver", 4), ("replica", 13), ("reference", 2)])
def test_only_those_that_were_asked_for(only: str, count: int) -> None:
    names = plan(count, 0, restarts=2, vllm=False, only=only)
    assert len(names) == count
    assert all(only in name for name in names)


def test_faults_of_different_kinds_are_in_flight_together() -> None:
    scene = replace(QUIET, in_flight=("reward hangs", "replica killed idle", "policy killed sending"))
    assert choose(["policy killed in a step", "reward raises"], scene) == 1, "the policy is lost once at a time"
    assert choose(["policy killed in a step"], replace(scene, in_flight=("reward hangs",))) == 0
    assert choose(["reward raises"], replace(scene, most_in_flight=3)) is None


def test_what_is_told_by_the_others_strikes_while_they_are_well() -> None:
    alone = "weight spoiled after verify"
    assert choose([alone, "reward raises"], QUIET) == 0
    assert choose([alone, "reward raises"], replace(QUIET, all_serve=False)) is None, "it has its turn"
    assert choose([alone, "reward raises"], replace(QUIET, in_flight=("reward hangs",))) is None
    assert choose(["reward raises"], replace(QUIET, in_flight=(alone,))) is None


def test_a_checkpoint_is_there_before_the_next_one_is_taken_away() -> None:
    assert choose(["newest checkpoint flipped"], replace(QUIET, num_checkpoints=1)) is None
    assert choose(["policy killed writing"], replace(QUIET, newest_is_new=False)) is None
    assert choose(["policy killed writing"], replace(QUIET, in_flight=("disk full writing a checkpoint",))) is None
    assert choose(["newest checkpoint flipped"], QUIET) == 0


def test_nobody_waits_for_a_point_that_is_not_come_to() -> None:
    names = ["policy killed saving the model", "policy killed restoring"]
    assert choose(names, replace(QUIET, num_checkpoints=0)) is None
    assert choose(names, QUIET) == 1
    assert choose(names, replace(QUIET, is_late=True)) == 0


def test_the_driver_ends_only_after_it_has_come_on() -> None:
    assert choose(["driver killed", "reward exits"], replace(QUIET, has_trained=False)) == 1
    assert choose(["driver killed", "reward exits"], QUIET) == 0


def test_a_thousand_faults_kill_the_driver_two_hundred_times() -> None:
    """As `make chaos` asks for them."""
    todo = batches(num_faults=1000, num_vllm=40, seed=0)
    names = [
        (batch.engine, name)
        for batch in todo
        for name in plan(batch.faults, batch.seed, restarts=round(0.26 * batch.faults), vllm=batch.engine == "vllm")
    ]
    assert len(names) == 1000
    assert sum(engine == "vllm" for engine, _ in names) == 40
    assert sum(CLASSES[name].restarts for _, name in names) >= 200
    assert {name for _, name in names} == {name for name, kind in CLASSES.items() if not kind.colocated}
