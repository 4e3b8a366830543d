"""Whole runs that go wrong: bad rows, a run that pauses itself and goes on, a reward that always fails."""

import json
import re
from pathlib import Path

import pytest

from tests.deploy.test_faults import RECIPE, REWARD
from tests.deploy.test_train import deploy
from tests.prove import ONLY_PROVE

FAILING = """
def digits(completions, **kwargs):
    raise KeyError("answer")
"""

ALWAYS = "health.rules=[{kind: entropy, window: 3, min: 99.0, action: pause}]"


def write(folder: Path, reward: str) -> str:
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": " "}\n{"prompt": "c"}\n')
    (folder / "reward.py").write_text(reward)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return str(folder / "recipe.yaml")


@ONLY_PROVE
@pytest.mark.cluster
def test_a_run_with_a_bad_row_pauses_itself_and_goes_on(tmp_path: Path) -> None:
    recipe = write(tmp_path, REWARD)
    refused = deploy("train", recipe)
    assert refused.returncode == 2
    assert "rows.jsonl: row 2: the prompt is empty" in refused.stderr
    assert "dataset.max_bad_rows allows 0 such rows" in refused.stderr
    paused = deploy("train", recipe, "steps=6", "dataset.max_bad_rows=1", ALWAYS)
    assert paused.returncode == 75, paused.stdout + paused.stderr
    said = " ".join((paused.stdout + paused.stderr).split())
    assert "stopped after 3 of 6 steps: entropy was" in said
    assert "health.rules: entropy pauses the run); the same command goes on" in said
    assert "warning: row 2 is set aside" in said
    whole = deploy("train", recipe, "steps=6", "dataset.max_bad_rows=1", "health.rules=[]")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["resumed"] == 1
    assert summary["rows_bad"] == 1
    assert summary["groups_trained"] == 12
    assert summary["steps_skipped"] == summary["groups_lost"] == summary["groups_duplicated"] == 0
    told = deploy("ledger", str(tmp_path / "run"))
    assert told.returncode == 0, told.stdout
    assert "What was set aside" in told.stdout


@ONLY_PROVE
@pytest.mark.cluster
def test_a_reward_that_always_fails_ends_the_run_and_is_named(tmp_path: Path) -> None:
    failed = deploy("train", write(tmp_path, FAILING), "steps=20", "dataset.max_bad_rows=1")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    said = " ".join(failed.stderr.split())
    assert "rewards failed in 11 of the last 11 groups (exception 11)" in said
    assert re.search(r"reward function digits: exception: \S*reward.py, line 3: KeyError: 'answer'", said)
    assert "rewards.max_failed_share" in said
    assert "Traceback" not in failed.stdout + failed.stderr


SPOILED = """
from pathlib import Path

def digits(completions, row, **kwargs):
    seen = Path(__file__).with_name(f"seen-{row[0]}")
    spoiled = 10 <= row[0] < 18 and not seen.exists()
    seen.touch()
    return [0.5, 0.5] if spoiled else [0.0, 1.0]
"""


@ONLY_PROVE
@pytest.mark.cluster
def test_a_run_goes_back_to_a_cut_that_was_taken_when_all_was_well(tmp_path: Path) -> None:
    """The rewards of four steps are spoiled: the rule takes three to find it, and no cut is taken meanwhile.

    What is sampled again is not spoiled, and what the cut holds already is too little for the rule to find it again.
    """
    recipe = write(tmp_path, SPOILED)
    rows = [json.dumps({"prompt": "abc"[row % 3], "row": row}) for row in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    rule = "health.rules=[{kind: zero_std, window: 3, action: roll_back}]"
    result = deploy("train", recipe, "steps=12", "dataset.shuffle=false", "checkpoint.every=1", rule)
    assert result.returncode == 0, result.stdout + result.stderr
    said = " ".join(result.stdout.split())
    assert "frac_reward_zero_std was 1.00 over the last 3 steps" in said
    assert re.search(r"goes on from step [45]", said)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["roll_backs"] == 1
    assert summary["policy_restarts"] == 0
    assert summary["groups_trained"] == 24
    assert summary["groups_lost"] == summary["groups_duplicated"] == 0
    assert summary["waste"]["rolled back"]["attempts"] >= 6
