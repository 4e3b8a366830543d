"""Each side runs in a process of its own, on the cores that this one may use, and has a deadline."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.end_to_end_case import REWARDS, Case, Measured
from benchmarks.end_to_end_model import NUM_PROMPT_TOKENS

_END_TIMEOUT_S = 60.0


def trl(case: Case, folder: Path, timeout_s: float) -> Measured:
    """Hugging Face's generation and Trainer, one process."""
    path = folder / f"trl-{case.trl_mode.split()[0]}.json"
    path.write_text(case.model_dump_json())
    _run([sys.executable, "-m", "benchmarks.end_to_end_trl", str(path)], path.with_suffix(".log"), timeout_s)
    return Measured.model_validate_json(path.with_suffix(".out.json").read_text())


def paceline(case: Case, folder: Path, timeout_s: float) -> Measured:
    """`python -m deploy train` with the defaults, but for what the case says."""
    path, run_dir = folder / "paceline.yaml", folder / "paceline"
    path.write_text(yaml.safe_dump(recipe_of(case, run_dir)))
    command = [sys.executable, "-m", "deploy", "train", str(path), "--overwrite"]
    _run(command, folder / "paceline.log", timeout_s)
    return read_metrics(case, [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()])


def recipe_of(case: Case, run_dir: Path) -> dict[str, Any]:
    """The case as a recipe."""
    return {
        "kind": "grpo",
        "name": "end-to-end",
        "run_dir": str(run_dir),
        "seed": case.seed,
        "steps": case.num_steps + case.max_staleness + 1,  # the last ones find their samples there, and are not counted
        "groups_per_batch": case.groups_per_batch,
        "model": {"kind": "pretrained", "path": case.model},
        "dataset": {"path": case.data},
        "rewards": {
            "functions": [{"function": f"{REWARDS}:{case.reward}"}],
            "max_concurrent_groups": case.max_concurrent_groups,
        },
        "algorithm": {
            "num_generations": case.num_generations,
            "vllm_importance_sampling_mode": "token_truncate",
        },
        "staleness": {"max_staleness": case.max_staleness},
        "generation": {
            "max_prompt_length": NUM_PROMPT_TOKENS,
            "max_completion_length": case.max_completion_length,
        },
        "optimizer": {"learning_rate": case.learning_rate},
        "checkpoint": {"every": 0},
        "policy": {"num_threads": case.policy_threads},
        "rollout": {
            "num_threads": case.engine_threads,
            "max_num_seqs": case.max_num_seqs,
            "max_groups_per_replica": case.max_groups_per_replica,
        },
        "pools": {
            "policy": {"cpus_per_worker": 0.5},
            "rollout": {"cpus_per_worker": 1},
            "reward": {"cpus_per_worker": 0.25},
        },
    }


def read_metrics(case: Case, steps: Sequence[dict[str, Any]]) -> Measured:
    """Samples/s after the warm-up and before the last steps, which train what has been sampled already.

    A window that used up a stock of groups would be flattered, so what was sampled in it counts when it is less than
    what was trained. Of the stock are the groups that are scored and half of each that is in flight: some have just
    begun, others are nearly done.
    """
    before, counted = steps[case.num_warm_up_steps - 1], steps[case.num_warm_up_steps : case.num_steps]
    seconds = sum(step["step_time"] for step in counted)
    gathered = _stock(counted[-1]) - _stock(before)
    num_groups = len(counted) * case.groups_per_batch + min(0.0, gathered)
    waits = sorted({name for step in counted for name in step if name.startswith("wait/")})
    return Measured(
        samples_per_s=num_groups * case.num_generations / seconds,
        step_s=seconds / len(counted),
        num_steps=len(counted),
        mean_length=_mean(counted, "completions/mean_length"),
        max_length=max(step["completions/max_length"] for step in counted),
        rewards=[step["reward"] for step in steps[: case.num_steps]],
        notes={
            "staleness mean": _mean(counted, "staleness/mean"),
            "staleness max": max(step["staleness/max"] for step in counted),
            **{name: sum(step.get(name, 0.0) for step in counted) / seconds for name in waits},
        },
    )


def _stock(step: dict[str, Any]) -> float:
    """Groups' worth of work that is done and not trained when the step ends."""
    return float(step["groups/ready"] + step["groups/in_flight"] / 2)


def _mean(steps: Sequence[dict[str, Any]], name: str) -> float:
    return sum(float(step[name]) for step in steps) / len(steps)


def _run(command: Sequence[str], log: Path, timeout_s: float) -> None:
    """The command's whole process group has ended when this returns; RuntimeError with its last lines if it failed."""
    env = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env |= {"RAY_worker_niceness": "0"}  # by itself Ray gives its workers a lower priority than TRL's process has
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(_END_TIMEOUT_S)
    if code != 0:
        how = f"did not end within {timeout_s:g} s" if code is None else f"ended with {code}"
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} {how}; see {log}:\n{last}")
