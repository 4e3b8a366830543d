"""A run whose driver is killed goes on by the same command, and trains every group exactly once.

Without staleness it trains what the unbroken run trains: the same prompts in the same order, of the same weights.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.checkpoint.store import CheckpointStore
from actors.journal import fates, read
from tests.deploy.test_faults import RECIPE, REWARD, wait_for_steps
from tests.prove import ONLY_PROVE

NUM_STEPS = 12


def train(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "deploy", "train", str(folder / "recipe.yaml"), *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def wait_until(condition: Callable[[], bool], process: psutil.Popen) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, "the run did not come that far"
        assert process.poll() is None, "the run has ended"
        time.sleep(0.2)


def is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return False


def journal_says(run: Path, event: str) -> bool:
    return f'"event": "{event}"' in (run / "ledger.jsonl").read_text()


def stop_in_order(folder: Path, run: Path, first: int) -> None:
    stopped = psutil.Popen(
        train(folder), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: journal_says(run, "resumed"), stopped)
    wait_for_steps(run, first + 2, stopped)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, said
    assert f"going on from step {first} of {NUM_STEPS}" in said
    assert f"of {NUM_STEPS} steps; the same command goes on" in said


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(600)  # four starts, each with an engine
def test_a_killed_run_goes_on_by_the_same_command(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    run = tmp_path / "run"
    log = (tmp_path / "log").open("w")
    process = psutil.Popen(train(tmp_path), env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for_steps(run, 5, process)
        # Ray's agents take their time to end.
        others = [child for child in process.children(recursive=True) if not is_agent(child)]
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        if process.is_running():
            process.kill()
        log.close()
    _, alive = psutil.wait_procs(others, timeout=40)
    assert not alive, "nothing of ours outlives the driver"
    first = CheckpointStore(run / "checkpoints").versions()[-1]
    assert first % 3 == 0

    refused = subprocess.run(
        [*train(tmp_path), "algorithm.beta=0.1"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2
    assert "algorithm.beta was 0.0 when the run began and is 0.1 now" in refused.stderr

    stop_in_order(tmp_path, run, first)

    again = subprocess.run(train(tmp_path), env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    found = fates(read(run / "ledger.jsonl"))
    assert list(found.problems()) == []
    assert found.lost() == set()
    assert found.num_cuts == 2
    assert found.trained.total() == 2 * NUM_STEPS
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(NUM_STEPS)), "every step is reported once"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["groups_lost"], summary["groups_duplicated"], summary["resumed"]) == (0, 0, 2)
    assert summary["weight_version"] == NUM_STEPS

    shown = subprocess.run(
        [sys.executable, "-m", "deploy", "ledger", str(run)], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "each ordinal was trained once" in shown.stdout


ON_POLICY = (
    RECIPE
    + """
seed: 11
staleness: {{max_staleness: 0}}
logging: {{completions_every: 1, num_completions: 2}}
"""
)


def standing(run: Path) -> list[dict[str, Any]]:
    """The journal's lines without those that were undone by going back to a cut."""
    events: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate((run / "ledger.jsonl").read_text().splitlines()):
        event = json.loads(line)
        if event["event"] == "resumed":
            events = [(place, past) for place, past in events if place < event["lines"]]
        else:
            events.append((number, event))
    return [event for _, event in events]


def story(run: Path) -> dict[str, Any]:
    """What was trained, when, in which order and on which weights' tokens, and what became of everything else."""
    events = standing(run)
    scored = {event["ordinal"]: event for event in events if event["event"] == "scored"}
    trained = [(event["step"], event["version"], event["ordinal"]) for event in events if event["event"] == "trained"]
    said = {
        step: [(sample["ordinal"], sample["prompt"]) for sample in map(json.loads, path.read_text().splitlines())]
        for step, path in enumerate(sorted((run / "completions").iterdir()))
    }
    found = fates(read(run / "ledger.jsonl"))
    return {
        "trained": trained,
        "versions of the tokens": {
            ordinal: sorted(map(int, event["tokens_by_version"])) for ordinal, event in scored.items()
        },
        "versions at dispatch": {e["ordinal"]: e["version"] for e in events if e["event"] == "dispatched"},
        "prompts": said,
        "fates": (dict(found.trained), found.left_out, found.quarantined, found.lost()),
    }


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(600)  # three starts, each with an engine
def test_a_killed_run_trains_what_the_unbroken_one_trains(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (folder := tmp_path / name).mkdir()
        (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdefghijk"))
        (folder / "reward.py").write_text(REWARD)
        (folder / "recipe.yaml").write_text(ON_POLICY.format(folder=folder))
    with (tmp_path / "log").open("w") as log:
        killed = psutil.Popen(train(tmp_path / "broken"), env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            run = tmp_path / "broken" / "run"
            wait_for_steps(run, 5, killed)
            wait_until(lambda: bool(CheckpointStore(run / "checkpoints").versions()), killed)
        finally:
            killed.kill()
            killed.wait(timeout=30)
    for name in ("broken", "whole"):
        done = subprocess.run(train(tmp_path / name), env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert fates(read(tmp_path / "broken" / "run" / "ledger.jsonl")).num_cuts == 1, "it went on from a checkpoint"
    broken, whole = story(tmp_path / "broken" / "run"), story(tmp_path / "whole" / "run")
    assert broken == whole
    steps = {ordinal: step for step, _, ordinal in whole["trained"]}
    assert whole["versions of the tokens"] == {ordinal: [step] for ordinal, step in steps.items()}
    order = [ordinal for _, _, ordinal in whole["trained"]]
    assert order == list(range(2 * NUM_STEPS)), "the data comes in the order of the ordinals"
    assert whole["prompts"].keys() == set(range(NUM_STEPS))
    prompts = [prompt for step in range(NUM_STEPS) for _, prompt in whole["prompts"][step]]
    assert prompts[:11] != sorted(prompts[:11]), "the rows are shuffled"
    assert sorted(prompts[:11]) == list("abcdefghijk"), "each row once in an epoch"
