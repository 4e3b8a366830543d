"""A whole run whose ranks share out each row is the run of one rank, to rounding, from the first metric to the weights.

Policy, critic and reference are real, DeepSpeed and all; the engines are light (tests/chaos), and what they sample does
not depend on the weights, or the first rounding would change every token behind it.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from actors.run.folder import RunFolder
from deploy.session import shut_in
from tests.deploy.test_methods import LIGHT, ROOT, SMALL
from tests.deploy.test_train import check_ledger
from tests.prove import ONLY_PROVE

NUM_STEPS, GROUPS = 4, 3
LEARNED = ("loss", "grad_norm", "entropy", "kl", "reward", "num_tokens", "learning_rate")
MEASURED = ("clip_ratio/", "sampling/", "value/", "completions/", "rewards/", "staleness/", "policy/updates")
OF_RUN = {
    "grpo": ["algorithm.beta=0.05"],
    "ppo": ["algorithm.num_generations=1", "groups_per_batch=12", f"pools.critic={SMALL}"],
}


def orders(folder: Path) -> dict[str, list[str]]:
    """Each run by one rank and by a team of two; the critic's ranks are a team as well."""
    found = {}
    for name, said in OF_RUN.items():
        for size in (1, 2):
            run = f"{name}-{size}"
            ranks = [f"policy.sequence_parallel_size={size}", f"pools.policy.num_workers={size}"]
            if name == "ppo":
                ranks += [f"critic.sequence_parallel_size={size}", f"pools.critic.num_workers={size}"]
            found[run] = [
                f"recipes/methods/{name}.yaml",
                *LIGHT,
                *said,
                *ranks,
                "model={kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 2}",
                "policy.num_threads=1",
                "staleness.max_staleness=0",
                f"steps={NUM_STEPS}",
                f"dataset={{path: {folder}/rows.jsonl}}",
                f"run_dir={folder}/{run}",
            ]
    return found


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_a_run_of_a_team_is_the_run_of_one_rank(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(23)))
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    shut_in(env)
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.steady_engines"],
        input=json.dumps([*orders(tmp_path).values()]),
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in OF_RUN:
        alone, team = (RunFolder(tmp_path / f"{name}-{size}") for size in (1, 2))
        check_metrics(name, alone.read_metrics(), team.read_metrics())
        check_weights(alone.path, team.path, "model", 1e-3)
        for folder in (alone, team):
            assert folder.finished
            check_ledger(folder.ledger, NUM_STEPS * (12 if name == "ppo" else GROUPS))
        if name == "ppo":
            check_weights(alone.path, team.path, "critic", 1e-3)


def learned(line: dict[str, Any]) -> dict[str, float]:
    """What follows from the tokens and the weights alone."""
    return {name: value for name, value in line.items() if name in LEARNED or name.startswith(MEASURED)}


def check_metrics(name: str, alone: list[dict[str, Any]], team: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in team] == [line["step"] for line in alone] == list(range(NUM_STEPS))
    for mine, its in zip(map(learned, team), map(learned, alone), strict=True):
        assert mine.keys() == its.keys()
        assert {"loss", "grad_norm", "entropy", "sampling/ess"} <= mine.keys()
        assert ("kl" in mine, "value/loss" in mine) == (name == "grpo", name == "ppo")
        assert mine["grad_norm"] > 0
        for metric, value in mine.items():
            assert math.isfinite(value), metric
            assert value == pytest.approx(its[metric], rel=1e-3, abs=1e-5), metric


def check_weights(alone: Path, team: Path, part: str, share: float) -> None:
    """They are nearer to each other than `share` of the way that one rank's have come."""
    ends = [load_file(folder / part / "model.safetensors") for folder in (alone, team)]
    begin = load_file(alone / "initial_model" / "model.safetensors")
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0].keys() & begin.keys():
        way = (ends[0][name] - begin[name]).norm()
        assert way > 0, name
        assert (ends[1][name] - ends[0][name]).norm() < share * way, name
