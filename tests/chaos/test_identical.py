"""A run that was killed and went on is, to the bit, the run that was not: same seed, no staleness."""

import json
import random
import time
from pathlib import Path

import pytest

from tests.chaos.faults import prepare
from tests.chaos.life import Journal, Life, preload
from tests.chaos.recipe import write_recipe
from tests.chaos.run import GROUPS_PER_BATCH
from tests.prove import PROVING

STEPS = 30


def run(folder: Path, kill_at: int | None) -> None:
    """To the end; killed once when `kill_at` steps are trained."""
    recipe = write_recipe(folder, steps=STEPS, seed=7, max_staleness=0, num_replicas=2)
    prepare(folder / "faults")
    journal = Journal(folder / "run" / "ledger.jsonl")
    for number in range(2):
        life = Life("light", folder, folder / f"log-{number}", recipe)
        life.start()
        deadline = time.monotonic() + 100
        while life.exit_code is None:
            assert time.monotonic() < deadline, "the run did not come that far"
            journal.look()
            if kill_at is not None and journal.trained >= kill_at * GROUPS_PER_BATCH:
                life.kill()
                kill_at = None
            time.sleep(0.01)
        if life.exit_code == 0:
            return
    raise AssertionError(life.log.read_text())


def rewards(folder: Path) -> list[tuple[int, float, float]]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["reward"], line["loss"]) for line in lines]


@pytest.mark.cluster
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    preload()
    run(tmp_path / "whole", None)
    # A checkpoint at 5 was written long before; `make prove` kills it somewhere else each time.
    killed_at = random.Random(None if PROVING else 0).randrange(11, STEPS - 3)
    print(f"killed at step {killed_at}")
    run(tmp_path / "killed", killed_at)
    journal = (tmp_path / "killed" / "run" / "ledger.jsonl").read_text()
    assert '"event": "resumed"' in journal, "it was killed after a checkpoint"
    assert rewards(tmp_path / "killed") == rewards(tmp_path / "whole")
    weights = [(tmp_path / name / "run" / "model" / "weights.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert not (tmp_path / "killed" / "faults" / "findings.txt").exists()
