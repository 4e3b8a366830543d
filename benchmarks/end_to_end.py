"""Whole runs against TRL 1.16's GRPOTrainer: the same model, data, reward, lengths and batch, on the same two cores.

    python -m benchmarks.end_to_end [--only short,long,slow_reward,curves] [--steps N] [--seeds N] [--quick]

Prints a table and, as its last line, one JSON object. Every figure is measured in this run, the sides in turn, each in
a process of its own with nothing beside it. Paceline's side is `python -m deploy train`: Ray, one vLLM replica, one
DeepSpeed rank, one reward worker. TRL's is the faster of its two modes that run on a CPU, Hugging Face's generate and
transformers' continuous batching: both are tried for a step in every case. Each step trains 256 completions of 32
prompts of 24 tokens with a byte-level model of 2.5 M parameters in float32. How long a completion gets lies in the
model's weights alone (end_to_end_model.py): half of them have 20 tokens or less, one in fifty 265 or more.
The learning rate is so small that this stays so, but for the reward curves: TRL is measured over its first steps, and
Paceline over later ones.

    over_trl_short        samples/s over TRL's where completions are cut off at 64 tokens: 28 on average
    over_trl_long         the same where they are cut off at 512: 44 on average
    over_trl_slow_reward  as short, with a reward that comes after a wait, lognormal with sigma 1 and a mean of 1 s for
                          each completion, those of one call side by side; Paceline's one reward worker may have
                          the calls of 128 groups in flight
    reward_gap            do both learn the same? The difference of mean final rewards (last quarter of the steps), in
                          pooled standard deviations over seeds, each with a model of its own. 2 or less is within
                          the noise of three seeds: a t-test at 5 % would ask for 2.3

TRL samples and trains in turn. Paceline samples ahead, so that both cores have work while a step waits for its last
completions: its tokens are at most 2 versions old in `short` and `slow_reward`, and at most 1, the default, where the
reward curves are compared. A completion of 512 tokens takes as long as several steps: in `long` the bound is 3, and 64
completions are decoded at once and not 256, which costs the engine nothing for each token and ends the longest four
times as soon, so that no step waits for one. The engine and the policy have a thread each there.

Starts do not count on either side: the clock runs from the end of the warm-up steps to the end of the last step. Of
Paceline's steps the last max_staleness + 1 do not count either, for which everything has been sampled. A window that
used up a stock of groups, scored or half done, is charged with it. OMP_NUM_THREADS is 2 on both sides.
"""

import json
import os
import random
import string
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.end_to_end_case import TRL_MODES, Case, Measured
from benchmarks.end_to_end_model import FIRST, NUM_PROMPT_TOKENS, make_stopping
from benchmarks.end_to_end_sides import paceline, trl
from benchmarks.usage import parser_of

OUT = Path("runs/end-to-end")
NUM_PROMPTS = 4096
TIMEOUT_S = 3600.0
"""Of one side in one case."""
PARTS = ("short", "long", "slow_reward", "curves")


def cases(steps: int | None, quick: bool) -> dict[str, Case]:
    """The loads whose speed is compared; `steps` are those that count."""
    warm, count = (1, steps or 2) if quick else (3, steps or 15)
    short = Case(
        name="short",
        model=str(OUT / "model"),
        data=str(OUT / "prompts.jsonl"),
        max_completion_length=64,
        num_steps=warm + count,
        num_warm_up_steps=warm,
        trl_steps=warm + count,
        max_staleness=2,
    )
    long = {
        "name": "long", "max_completion_length": 512, "trl_micro_batch": 16,
        "num_steps": warm + 1 + count, "num_warm_up_steps": warm + 1,  # what was begun all at once is trained
        "trl_steps": 1 + max(1, count // 5), "trl_warm_up_steps": 1, "max_staleness": 3,
        "max_num_seqs": 64, "max_groups_per_replica": 24, "policy_threads": 1,
    }  # fmt: skip
    slow = {"name": "slow_reward", "reward": "lower_case_slowly", "max_concurrent_groups": 128}
    return {"short": short, "long": short.model_copy(update=long), "slow_reward": short.model_copy(update=slow)}


def curve(seed: int, steps: int | None, quick: bool) -> Case:
    """A load on which both sides learn, with a model of the seed's own."""
    count = steps or (4 if quick else 40)
    return Case(
        name=f"curve-{seed}",
        model=str(OUT / f"model-{seed}"),
        data=str(OUT / "prompts.jsonl"),
        seed=seed,
        max_completion_length=16,
        learning_rate=1e-3,
        num_steps=count,
        num_warm_up_steps=1,
        trl_steps=count,
    )


def write_prompts(path: Path) -> None:
    """Random letters behind the token that every prompt begins with."""
    drawn = random.Random(0)
    prompts = ("".join(drawn.choices(string.ascii_lowercase, k=NUM_PROMPT_TOKENS - 1)) for _ in range(NUM_PROMPTS))
    path.write_text("".join(json.dumps({"prompt": FIRST + prompt}) + "\n" for prompt in prompts))


def compare(case: Case, say: Any) -> dict[str, Measured]:
    """Both of TRL's modes for a step, to see which is faster here; then that one and Paceline, in turn."""
    folder = OUT / case.name
    folder.mkdir(parents=True, exist_ok=True)
    modes = {mode: case.model_copy(update={"trl_mode": mode}) for mode in TRL_MODES}
    measured = {}
    for mode, tried in modes.items():
        say(f"{case.name}: TRL, {mode}, tried")
        one = tried.model_copy(update={"trl_steps": 2, "trl_warm_up_steps": 1})
        measured[f"TRL, {mode}, tried"] = trl(one, folder, TIMEOUT_S)
    faster = max(TRL_MODES, key=lambda mode: measured[f"TRL, {mode}, tried"].samples_per_s)
    say(f"{case.name}: TRL, {faster}")
    measured["TRL"] = trl(modes[faster], folder, TIMEOUT_S)
    say(f"{case.name}: Paceline")
    return measured | {"Paceline": paceline(case, folder, TIMEOUT_S)}


def ratio(measured: dict[str, Measured]) -> float:
    """Paceline's samples/s over TRL's."""
    return measured["Paceline"].samples_per_s / measured["TRL"].samples_per_s


def reward_gap(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """In pooled standard deviations over seeds, from the reward curves of each seed."""
    final = [[fmean(curve[-max(1, len(curve) // 4) :]) for curve in side] for side in (ours, theirs)]
    spread = (sum(stdev(side) ** 2 for side in final) / 2) ** 0.5
    return abs(fmean(final[0]) - fmean(final[1])) / spread


def curves(seeds: int, steps: int | None, quick: bool, say: Any) -> tuple[list[Measured], list[Measured]]:
    """Paceline's and TRL's, seed by seed."""
    ours, theirs = [], []
    for seed in range(seeds):
        case = curve(seed, steps, quick)
        folder = OUT / case.name
        folder.mkdir(parents=True, exist_ok=True)
        make_stopping(Path(case.model), seed)
        say(f"{case.name}: TRL")
        theirs.append(trl(case, folder, TIMEOUT_S))
        say(f"{case.name}: Paceline")
        ours.append(paceline(case, folder, TIMEOUT_S))
    return ours, theirs


def rows(name: str, measured: dict[str, Measured]) -> list[tuple[str, ...]]:
    """A line for each side."""
    return [
        (
            name, side, f"{m.samples_per_s:.1f}", f"{m.step_s:.2f}", str(m.num_steps), f"{m.mean_length:.1f}",
            f"{m.max_length:.0f}",
        )
        for side, m in measured.items()
    ]  # fmt: skip


def notes(name: str, measured: dict[str, Measured]) -> list[str]:
    """A line for each side that has any: waits are shares of its time."""
    return [
        f"{name}, {side}: " + ", ".join(f"{key} {value:.2f}" for key, value in m.notes.items())
        for side, m in measured.items()
        if m.notes
    ]


def main() -> None:
    parser = parser_of("benchmarks.end_to_end", __doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--steps", type=int, help="steps that count on Paceline's side, in place of each part's own")
    parser.add_argument("--seeds", type=int, default=3, help="of the reward curves, 2 or more")
    parser.add_argument("--quick", action="store_true", help="a few steps of each: does it run?")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}: not one of {', '.join(PARTS)}")
    if given.seeds < 2 or (given.steps or 1) < 1:
        parser.error("--seeds: 2 or more, and --steps 1 or more")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    console = Console()
    OUT.mkdir(parents=True, exist_ok=True)
    write_prompts(OUT / "prompts.jsonl")
    make_stopping(OUT / "model", 0)
    table = Table("part", "side", "samples/s", "s a step", "steps", "tokens, mean", "longest")
    figures: dict[str, Any] = {}
    told: list[str] = []

    def add(name: str, measured: dict[str, Measured]) -> None:
        told.extend(notes(name, measured))
        for row in rows(name, measured):
            table.add_row(*row)

    for name, case in cases(given.steps, given.quick).items():
        if name in parts:
            measured = compare(case, console.print)
            figures[f"over_trl_{name}"] = ratio(measured)
            add(name, measured)
    if "curves" in parts:
        ours, theirs = curves(given.seeds, given.steps, given.quick, console.print)
        figures["reward_gap"] = reward_gap([m.rewards for m in ours], [m.rewards for m in theirs])
        for seed, pair in enumerate(zip(ours, theirs, strict=True)):
            add(f"curve {seed}", dict(zip(("Paceline", "TRL"), pair, strict=True)))
    console.print(table)
    for line in told:
        console.print(line, soft_wrap=True, highlight=False)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
