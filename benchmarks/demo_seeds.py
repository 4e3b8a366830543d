"""The demo on several seeds: what it teaches, how stale the samples were, how long it took.

    python -m benchmarks.demo_seeds [SEED ...]

Each seed is a whole demo by the command line, the supervised warm-up seeded as well. Prints a table and, as its last
line, one JSON object: `reward_gain_min`, `max_staleness_seen`, `max_staleness_allowed`, `seconds_max` and the rows.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.usage import parser_of

OUT = Path("runs/demo-seeds")


def run(seed: int) -> dict[str, Any]:
    """One demo; its summary with the seconds that both commands took together."""
    warm, grpo = OUT / f"sft-{seed}", OUT / f"grpo-{seed}"
    started = time.monotonic()
    _train("recipes/demo_sft.yaml", f"seed={seed}", f"run_dir={warm}")
    _train("recipes/demo.yaml", f"seed={seed}", f"run_dir={grpo}", f"model={{kind: pretrained, path: {warm}/model}}")
    summary: dict[str, Any] = json.loads((grpo / "summary.json").read_text())
    return summary | {"seconds": time.monotonic() - started}


def _train(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "deploy", "train", *arguments, "--overwrite"], check=True, timeout=1800)


def main() -> None:
    parser = parser_of("benchmarks.demo_seeds", __doc__)
    parser.add_argument("seeds", metavar="SEED", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    rows = [run(seed) for seed in parser.parse_args().seeds]
    columns = ("seed", "reward first tenth", "reward last tenth", "gain", "staleness mean", "max", "bound", "seconds")
    table = Table(*columns)
    for row in rows:
        table.add_row(
            str(row["seed"]),
            f"{row['reward_first']:.3f}",
            f"{row['reward_last']:.3f}",
            f"{row['reward_last'] - row['reward_first']:+.3f}",
            f"{row['staleness_mean']:.2f}",
            str(row["max_staleness_seen"]),
            str(row["max_staleness_allowed"]),
            f"{row['seconds']:.0f}",
        )
    Console().print(table)
    result = {
        "reward_gain_min": min(row["reward_last"] - row["reward_first"] for row in rows),
        "max_staleness_seen": max(row["max_staleness_seen"] for row in rows),
        "max_staleness_allowed": max(row["max_staleness_allowed"] for row in rows),
        "seconds_max": max(row["seconds"] for row in rows),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
