"""A killed replica costs at most one step of waiting, and its successor serves within two publications."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.audit import audit
from tests.chaos.faults import STARTED, arm, has_fired, prepare, set_pace
from tests.chaos.life import Journal, Life, preload
from tests.chaos.recipe import write_recipe
from tests.chaos.recovery import recovery
from tests.chaos.run import GROUPS_PER_BATCH
from tests.prove import ONLY_PROVE

STEPS = 90
KILLS = (("fill", 10), ("score", 25), ("bucket", 40), ("swap", 55), ("idle", 70))
"""Where a replica is killed, and after which version."""


@ONLY_PROVE  # it compares a start with steps in time, which a busy machine bends
@pytest.mark.cluster
def test_a_killed_replica_costs_little(tmp_path: Path) -> None:
    preload()
    recipe = write_recipe(tmp_path, steps=STEPS, seed=5, max_staleness=1, num_replicas=3, num_rewards=1)
    prepare(tmp_path / "faults")
    set_pace(tmp_path / "faults", 0.2)
    journal = Journal(tmp_path / "run" / "ledger.jsonl")
    life = Life("light", tmp_path, tmp_path / "log", recipe)
    life.start()
    try:
        follow(life, journal, tmp_path / "faults")
    finally:
        if life.exit_code is None:
            life.kill()
    assert life.exit_code == 0, life.log.read_text()
    found = recovery(tmp_path)
    print(found)
    assert len(found.publications) >= len(KILLS), "each got a successor, and that has served"
    assert max(found.publications.values()) <= 2
    assert len(found.steps_waited) >= 3, "some had groups when they died"
    assert max(found.steps_waited.values()) <= 1
    counts = audit(tmp_path, GROUPS_PER_BATCH, STEPS)
    assert (counts.lost, counts.duplicated, counts.recovery_steps_max) == (0, 0, 0)


def follow(life: Life, journal: Journal, faults: Path) -> None:
    """To the end, one kill after another."""
    deadline = time.monotonic() + 150.0
    kills = [(f"rollout.{point}.kill.{version:04d}", version) for point, version in KILLS]
    while life.exit_code is None:
        assert time.monotonic() < deadline, "the run did not come to its end"
        journal.look()
        if kills and journal.version >= kills[0][1]:
            name, _ = kills.pop(0)
            arm(faults, name)
        time.sleep(0.01)
    assert all(has_fired(faults, f"rollout.{point}.kill.{version:04d}") for point, version in KILLS)


def line(event: str, t: float, **details: Any) -> dict[str, Any]:
    return {"event": event, "ordinal": 0, "t": t, **details}


def test_the_cost_is_read_from_the_journal(tmp_path: Path) -> None:
    """Replica 1 dies in step 3 with ordinals 31 and 40; step 3 waits for 31, step 4 for others, step 5 not at all."""
    lines: list[dict[str, Any]] = []
    late = {31: 3.9, 40: 4.1, 41: 4.8, 51: 4.0}
    for step in range(10):
        for ordinal in (10 * step, 10 * step + 1):
            lines.append(line("scored", late.get(ordinal, step - 0.1), ordinal=ordinal))
            if ordinal in (31, 40, 51):
                lines.append(line("failed", 2.5, ordinal=ordinal, cause="replica 1: dead"))
        t = {3: 4.0, 4: 4.9}.get(step, float(step))
        lines += [line("trained", t, ordinal=10 * step + place, step=step, version=step + 1) for place in (0, 1)]
    lines.insert(40, line("dispatched", 8.5, replica=3, version=8))
    lines.insert(0, line("dispatched", 0.0, replica=0, version=0))
    (tmp_path / "run").mkdir()
    (tmp_path / "faults").mkdir()
    (tmp_path / "run" / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    started = [{"replica": 0, "version": None}, {"replica": 3, "version": 5}]
    (tmp_path / "faults" / STARTED).write_text("".join(json.dumps(one) + "\n" for one in started))
    found = recovery(tmp_path)
    assert found.publications == {3: 3}
    assert found.steps_waited == {1: 0}, "0.9 s is less than a step usually takes"
    text = (tmp_path / "run" / "ledger.jsonl").read_text().replace("3.9}", "5.9}")
    (tmp_path / "run" / "ledger.jsonl").write_text(text)
    assert recovery(tmp_path).steps_waited == {1: 1}
