"""Whole runs whose replica, critic and reference lie with the policy, with real Ray and DeepSpeed: with vLLM's engine
(on CPUs one at rest frees nothing; it is put to sleep and woken up by the same calls), or with a light one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.checkpoint.store import CheckpointStore
from deploy.session import shut_in
from tests.chaos import faults
from tests.deploy.test_faults import wait_for_steps, workers
from tests.deploy.test_train import DIGITS, check_ledger, lines
from tests.deploy.timed_workers import FOLDER, noted
from tests.prove import ONLY_PROVE

NUM_STEPS = 8

RECIPE = """
kind: grpo
name: colocated
steps: 8
groups_per_batch: 2
run_dir: {folder}/run
model: {{kind: tiny, hidden_size: 64, num_layers: 2, num_heads: 1, max_position_embeddings: 512}}
dataset: {{path: {folder}/rows.jsonl}}
rewards: {{functions: [{{function: "{folder}/reward.py:digits"}}]}}
algorithm: {{num_generations: 2}}
optimizer: {{learning_rate: 1.0e-12}}
staleness: {{max_staleness: 1}}
generation: {{max_prompt_length: 16, max_completion_length: 400}}
rollout: {{num_threads: 1}}
logging: {{completions_every: 1, num_completions: 4}}
pools:
  policy: {{cpus_per_worker: 0.5}}
  rollout: {{cpus_per_worker: 0.5, colocate_with: policy}}
  reward: {{cpus_per_worker: 0.25}}
"""
CRITIC = (
    "algorithm={num_generations: 1, advantage: gae, baseline: none, scale_rewards: none, beta: 0.01, "
    "kl_penalty: reward, old_logprobs: sampled, vllm_importance_sampling_correction: false}",
    "critic={learning_rate: 1.0e-3, warmup_steps: 2}",
    "pools.critic={cpus_per_worker: 0.1, colocate_with: policy}",
    "pools.reference={cpus_per_worker: 0.1, colocate_with: policy}",
)
ADAPTERS = ("policy.lora={r: 4, lora_alpha: 8}", "algorithm.beta=0.01")
LEARNS = ("optimizer.learning_rate=1.0e-2", "staleness.max_staleness=0", "generation.max_completion_length=100")


@dataclass(frozen=True, slots=True)
class Done:
    """What is left of a run."""

    run: Path
    metrics: list[dict[str, Any]]
    passes: list[tuple[float, float]]
    """From when to when an engine computed."""
    steps: list[tuple[float, float]]
    critic: list[tuple[float, float]]
    values: list[tuple[float, float]]

    @property
    def spans(self) -> list[int]:
        """How many weight versions sampled each completion that was written down."""
        paths = sorted((self.run / "completions").iterdir())
        return [len(rollout["weight_versions"]) for path in paths for rollout in lines(path)]


def prepared(folder: Path, overrides: Sequence[str], light: bool) -> tuple[list[str], dict[str, str]]:
    """The command, and its environment."""
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (folder / "reward.py").write_text(DIGITS)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    (folder / "times").mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    shut_in(env)  # before Ray is imported there
    env |= {"HF_HUB_OFFLINE": "1", FOLDER: str(folder / "times")}
    command = [sys.executable, "-m", "tests.deploy.timed_workers", *(["--light"] if light else [])]
    return [*command, str(folder / "recipe.yaml"), *overrides], env


def trained(folder: Path, overrides: Sequence[str] = (), light: bool = False) -> Done:
    """Nothing is lost, the bound is kept, and no token is sampled while the policy steps."""
    command, env = prepared(folder, overrides, light)
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    kinds = (noted(folder / "times", kind) for kind in ("pass", "step", "critic", "values"))
    done = Done(folder / "run", lines(folder / "run" / "metrics.jsonl"), *kinds)
    for since, until in done.steps:
        assert not [one for one in done.passes if one[0] < until and one[1] > since]
    assert [one for one in done.passes if done.steps[0][1] < one[0] < done.steps[-1][0]], "and between them some are"
    summary = json.loads((done.run / "summary.json").read_text())
    assert summary["groups_trained"] == 2 * NUM_STEPS
    assert summary["groups_lost"] == summary["groups_duplicated"] == 0
    assert summary["max_staleness_seen"] <= summary["max_staleness_allowed"]
    check_ledger(done.run / "ledger.jsonl", 2 * NUM_STEPS)
    assert len(done.metrics) == NUM_STEPS
    assert all(row["sync/rest_s"] > 0 for row in done.metrics)
    return done


def check_critic(done: Done) -> None:
    """It learns in every step, and the policy in all but the first two; both are measured against the reference."""
    assert len(done.critic) == len(done.values) == NUM_STEPS
    assert len(done.steps) == NUM_STEPS - 2
    assert all(row["value/grad_norm"] > 0 and row["value/skipped"] == 0 for row in done.metrics)
    assert all("kl" in row for row in done.metrics[2:])
    assert [row["policy/updates"] for row in done.metrics] == [0.0, 0.0, *[1.0] * (NUM_STEPS - 2)]
    assert (done.run / "critic" / "model.safetensors").exists()


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_engines_rest_while_the_policy_steps_beside_a_critic_and_a_reference(tmp_path: Path) -> None:
    """Light engines, which assert that they are asleep, awake and loaded in the right order."""
    check_critic(trained(tmp_path, [*CRITIC, "checkpoint.every=3"], light=True))


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_run_that_is_stopped_while_an_engine_is_built_does_not_wait_for_that(tmp_path: Path) -> None:
    """Its successor hangs when one of two is killed; the other fills the batch that the policy may not take."""
    two = "pools.rollout={num_workers: 2, cpus_per_worker: 0.25, colocate_with: policy}"
    command, env = prepared(tmp_path, [two, "steps=2000", "checkpoint.every=1000", "stall.timeout_s=60"], light=True)
    chaos, run, log = tmp_path / "chaos", tmp_path / "run", tmp_path / "log"
    faults.prepare(chaos)
    with log.open("w") as said:
        train = psutil.Popen(command, env=env | {faults.FOLDER: str(chaos)}, stdout=said, stderr=said)
    try:
        wait_for_steps(run, 3, train)
        hangs = "rollout.start.hang.0"
        faults.arm(chaos, hangs)
        workers(train, "TimedLight")[0].kill()
        deadline = time.monotonic() + 60.0
        while not faults.has_fired(chaos, hangs):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(3.0)
        num_steps = len(lines(run / "metrics.jsonl"))
        train.send_signal(signal.SIGTERM)
        assert train.wait(timeout=60) == 75, log.read_text()
    finally:
        if train.is_running():
            train.kill()
            train.wait(timeout=30)
    assert len(lines(run / "metrics.jsonl")) == num_steps, "no step was taken beside it"
    assert CheckpointStore(run / "checkpoints").versions() == [num_steps]


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_no_token_is_sampled_while_the_policy_steps(tmp_path: Path) -> None:
    """Requests that run when a step begins go on after it: the weights stand still, so a cache that was not computed
    again as it was would show in the log-probabilities."""
    done = trained(tmp_path)
    assert len(done.steps) == NUM_STEPS
    check_tokens(done)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_critic_and_a_reference_lie_with_the_policy_beside_an_engine(tmp_path: Path) -> None:
    done = trained(tmp_path, CRITIC)
    check_critic(done)
    check_tokens(done)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_requests_with_an_adapter_go_on_after_a_step(tmp_path: Path) -> None:
    """The weights below the adapter have waited in the host's memory."""
    done = trained(tmp_path, ADAPTERS)
    assert len(done.steps) == NUM_STEPS
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-6) for row in done.metrics)
    check_tokens(done)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_an_adapter_that_learns_is_the_engines_when_it_wakes_up(tmp_path: Path) -> None:
    """Each batch is of the newest version alone, so the policy says of its tokens what the engine has said."""
    done = trained(tmp_path, [*ADAPTERS, *LEARNS])
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in done.metrics)
    assert done.metrics[-1]["kl"] > 1e-4, "the adapter was meant to move"
    assert (done.run / "model" / "adapter").is_dir()


def check_tokens(done: Done) -> None:
    """A policy whose weights stand still says of every token what the engine has said, across its rests."""
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-3 for row in done.metrics[-(NUM_STEPS - 2) :])
    assert max(done.metrics, key=lambda row: row["staleness/max"])["staleness/max"] == 1
    assert max(done.spans, default=0) > 1, "a request was meant to go on after a step"
