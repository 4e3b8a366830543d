"""PPO end to end: the critic learns beside the policy, is part of every cut, and may die as a policy rank may.

Policy, critic and reference are real, DeepSpeed and all; the engines are light (tests/chaos).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from actors.checkpoint.store import CheckpointStore
from actors.journal import fates, read
from deploy.session import shut_in
from tests.deploy.test_faults import wait_for_steps, workers
from tests.deploy.test_methods import LIGHT, ROOT, SMALL
from tests.prove import ONLY_PROVE

NUM_STEPS, GROUPS, EVERY = 40, 6, 3


SHARED = '{"cpus_per_worker": 0.1, "colocate_with": "policy"}'


def order(folder: Path, colocated: bool) -> list[str]:
    shared = [f"pools.{pool}={SHARED}" for pool in ("critic", "reference", "rollout")] if colocated else []
    return [
        "recipes/methods/ppo.yaml",
        *LIGHT,
        f"steps={NUM_STEPS}",
        f"groups_per_batch={GROUPS}",
        "algorithm.num_generations=1",
        "algorithm.beta=0.01",
        "algorithm.kl_penalty=reward",
        "critic.warmup_steps=2",
        f"pools.critic={SMALL}",
        f"checkpoint.every={EVERY}",
        "liveness.every_s=1",
        f"dataset={{path: {folder}/rows.jsonl}}",
        f"run_dir={folder}/run",
        *shared,
    ]


def started(folder: Path, colocated: bool) -> psutil.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    shut_in(env)
    (folder / "order.json").write_text(json.dumps([order(folder, colocated)]))
    with (folder / "order.json").open() as said, (folder / "log").open("a") as log:
        return psutil.Popen(
            [sys.executable, "-m", "tests.deploy.light_engines"],
            stdin=said,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=ROOT,
        )


def ended(train: psutil.Popen) -> None:
    if train.is_running():
        train.kill()
        train.wait(timeout=30)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("colocated", [False, True], ids=["apart", "colocated"])
def test_a_critic_may_die_and_a_run_with_one_goes_on_by_the_same_command(colocated: bool, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(23)))
    run, log = tmp_path / "run", tmp_path / "log"
    train = started(tmp_path, colocated)
    try:
        wait_for_steps(run, EVERY + 2, train)
        (rank,) = workers(train, "CriticActor")
        rank.kill()
        wait_for_steps(run, 2 * EVERY + 3, train)
        train.kill()
        train.wait(timeout=30)
    finally:
        ended(train)
    assert re.search(r"warning: .*critic.*; the policy is built again and goes on from step \d+\n", log.read_text())
    store = CheckpointStore(run / "checkpoints")
    version = store.versions()[-1]
    with safe_open(store.open(version) / "critic" / "model" / "model.safetensors", "np") as file:
        assert "score.weight" in set(file.keys())
    again = started(tmp_path, colocated)
    try:
        assert again.wait(timeout=400) == 0, log.read_text()
    finally:
        ended(again)

    told = fates(read(run / "ledger.jsonl"))
    assert not [*told.problems(), *told.lost()]
    assert sum(told.trained.values()) == GROUPS * NUM_STEPS
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(NUM_STEPS))
    assert [line["policy/updates"] for line in metrics[:3]] == [0.0, 0.0, 1.0], "the critic warms up alone"
    for line in metrics:
        assert line["value/loss"] >= 0
        assert line["value/skipped"] == 0
        assert line["value/grad_norm"] > 0
        assert line["weights/version"] == line["step"] + 1
    assert all(line["grad_norm"] > 0 for line in metrics[2:])
    assert metrics[-1]["staleness/max"] <= 2
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["groups_lost"], summary["groups_duplicated"]) == (0, 0)
    assert (run / "critic" / "model.safetensors").exists()
    assert (run / "critic" / "tokenizer.json").exists()
