"""The recipe of a chaos run: deadlines of seconds, and as many replacements as there are faults."""

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 4.0
MANY = 500
"""More than all faults of a run."""
CHECKPOINT_EVERY = 5
MAX_PROMPT_LENGTH = 32
_NUM_ROWS = 23


def write_recipe(
    folder: Path,
    *,
    steps: int,
    seed: int,
    max_staleness: int = 1,
    when_stale: str = "pace",
    over_sampling: float = 1.0,
    num_bad_rows: int = 0,
    num_replicas: int = 3,
    num_ranks: int = 1,
    num_rewards: int = 2,
    engine: str = "light",
    colocated: bool = False,
) -> Path:
    """Everything of the run is in `folder`; the path of its recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"row {index}" for index in range(_NUM_ROWS if num_bad_rows == 0 else 100 * num_bad_rows)]
    prompts += ["bad " * MAX_PROMPT_LENGTH] * num_bad_rows
    (folder / "rows.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    small = {"cpus_per_worker": 0.1}
    recipe: dict[str, Any] = {
        "kind": "grpo",
        "name": "chaos",
        "seed": seed,
        "steps": steps,
        "groups_per_batch": 4,
        "run_dir": str(folder / "run"),
        "model": {"kind": "tiny", "hidden_size": 32, "num_layers": 1, "num_heads": 1},
        "dataset": {"path": str(folder / "rows.jsonl"), "max_bad_rows": len(prompts) - 1},
        "rewards": {
            "functions": [{"function": f"{ROOT}/tests/chaos/reward.py:score"}],
            "timeout_s": 1.5,
            "max_failed_share": 1.0,
        },
        "algorithm": {"num_generations": 4, "beta": 0.01},
        "staleness": {
            "max_staleness": max_staleness,
            "when_stale": when_stale,
            "over_sampling": over_sampling,
        },
        "generation": {"max_prompt_length": MAX_PROMPT_LENGTH, "max_completion_length": 24, "timeout_s": 20.0},
        "policy": {"timeout_s": 20.0, "max_restarts": MANY, "num_threads": 1},
        "rollout": {
            "start_timeout_s": 60.0,
            "max_rebuilds": MANY,
            "max_attempts": MANY,
            "num_threads": 1,
            "max_groups_per_replica": 4,
        },
        "liveness": {"every_s": 0.5, "timeout_s": TIMEOUT_S, "max_restarts": MANY},
        "sync": {"timeout_s": TIMEOUT_S, "bucket_mb": 0.01, "checksum_every": 1},
        "checkpoint": {"every": CHECKPOINT_EVERY, "keep": 2, "timeout_s": 20.0},
        "logging": {"completions_every": 25},
        "pools": {
            "policy": {"num_workers": num_ranks, **small},
            "reference": small,
            "reward": {"num_workers": num_rewards, **small},
            "rollout": {"num_workers": num_replicas, **small},
        },
    }
    if engine == "vllm":
        recipe |= {"model": {"kind": "tiny", "hidden_size": 64, "num_layers": 2, "num_heads": 1}}
        recipe["algorithm"] = {"num_generations": 2}
        recipe["pools"] |= {"policy": small, "rollout": {"num_workers": 2, **small}}
        recipe["rollout"] |= {"start_timeout_s": 180.0}
        recipe["sync"] |= {"timeout_s": 15.0, "bucket_mb": 0.1, "checksum_every": 5}
        recipe["liveness"] |= {"every_s": 3.0, "timeout_s": 20.0}
        recipe["policy"] |= {"timeout_s": 60.0}
        recipe["generation"] |= {"max_completion_length": 48, "timeout_s": 60.0}
    if colocated:
        recipe["pools"]["rollout"] |= {"colocate_with": "policy"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"
