"""What checkpoints cost a policy in training: how long it stands still, and how slow it is while one is written.

    python -m benchmarks.checkpoint [--quick]

Prints a table and, as its last line, one JSON object; about three minutes on two cores. `--quick` takes a smaller model
and fewer rounds, half a minute, and says little about the shares that are reported. One DeepSpeed rank (ZeRO 1,
AdamW, float32) trains a model of 34 M parameters in this process; what the run's driver does to a checkpoint, digests
and syncs, is done in a process of its own, as in a run. Everything is measured in this run, in turns, medians.

    stall_share                 of training time that the policy stands still, at the default of steps between cuts
    stall_over_memcpy           the stall over one copy in memory of as many bytes, into memory that was used before
    stall_ms                    from the call that takes a snapshot to its return
    blocking_ms                 what it would be if the policy waited until the checkpoint is on the disk
    write_s                     in the background, from the stall's end until the checkpoint is committed
    bytes                       of a checkpoint: weights and AdamW's two moments
    step_slowdown_while_writing a step that begins while a checkpoint is written over a step without
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from actors.checkpoint.config import CheckpointConfig
from actors.checkpoint.store import CheckpointStore
from actors.model.tiny import make_tiny_model
from actors.objective import Objective
from actors.policy import PolicyActor
from actors.policy_calls import PolicySettings, RankBatch
from actors.recipe.model import TinyModel
from actors.recipe.policy import PolicyConfig
from algorithms.config import OptimizerConfig
from algorithms.losses import Normalizer
from algorithms.types import Group, MicroBatch, Prompt, Rollout, Sample
from benchmarks.usage import parser_of

MODEL = TinyModel(kind="tiny", hidden_size=512, num_layers=8, num_heads=8)
NUM_ROUNDS = 5
QUICK_MODEL = TinyModel(kind="tiny", hidden_size=256, num_layers=4, num_heads=4)
QUICK_ROUNDS = 2
NUM_SEQUENCES, LENGTH = 4, 32
"""Of a batch: fewer tokens than a run has, so that the stall is a larger share of the time."""
NUM_STEPS = 3
"""Without a checkpoint, in each round."""
EVERY = CheckpointConfig().every


@dataclass(slots=True)
class Measured:
    """Seconds."""

    num_bytes: int = 0
    steps: list[float] = field(default_factory=list)
    steps_while_writing: list[float] = field(default_factory=list)
    first_stall: float = 0.0
    """Into memory that nobody has used before."""
    stalls: list[float] = field(default_factory=list)
    writes: list[float] = field(default_factory=list)
    blocking: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        step, stall = median(self.steps), median(self.stalls)
        return {
            "stall_share": stall / (EVERY * step + stall),
            "stall_over_memcpy": stall / median(self.copies),
            "stall_ms": stall * 1e3,
            "blocking_ms": median(self.blocking) * 1e3,
            "write_s": median(self.writes),
            "bytes": self.num_bytes,
            "step_slowdown_while_writing": median(self.steps_while_writing) / step,
        }

    def table(self) -> Table:
        found = self.figures()
        copy_ms, step_ms = median(self.copies) * 1e3, median(self.steps) * 1e3
        late_ms = median(self.steps_while_writing) * 1e3
        rows = {
            "stall_share": ("0.05 or less", f"a cut every {EVERY} steps of {step_ms:.0f} ms"),
            "stall_over_memcpy": ("2 or less", f"over a copy in {copy_ms:.0f} ms"),
            "stall_ms": ("", f"{len(self.stalls)} cuts; the first, into fresh memory, {self.first_stall * 1e3:.0f} ms"),
            "blocking_ms": ("", f"{len(self.blocking)} saves that training waits for"),
            "write_s": ("", "safetensors, digests, sync and rename, beside training"),
            "bytes": ("", "weights and two moments in float32"),
            "step_slowdown_while_writing": (
                "",
                f"{late_ms:.0f} ms over {step_ms:.0f} ms; {len(self.steps_while_writing)} and {len(self.steps)} steps, "
                f"{os.cpu_count()} cores",
            ),
        }
        shown = Table("figure", "value", "target", "how")
        for name, (target, how) in rows.items():
            shown.add_row(name, f"{found[name]:.3g}", target, how)
        return shown


def policy(folder: Path, model: TinyModel) -> PolicyActor:
    """One rank, in this process."""
    make_tiny_model(model, folder / "model", seed=0)
    settings = PolicySettings(
        model_path=str(folder / "model"),
        revision=None,
        trust_remote_code=False,
        num_ranks=1,
        use_gpu=False,
        seed=0,
        num_steps=10_000,
        policy=PolicyConfig(zero_stage=1, num_threads=os.cpu_count()),
        optimizer=OptimizerConfig(),
        objective=Objective(None, 1.0, LENGTH),
        run_dir=str(folder),
    )
    rank = PolicyActor(0, settings)
    rank.start(*rank.address())
    return rank


def batch() -> tuple[RankBatch, list[Group]]:
    random = np.random.default_rng(0)
    mask = np.arange(LENGTH) >= 1
    zeros = np.zeros(LENGTH, np.float32)
    ids = [random.integers(0, 256, LENGTH).astype(np.int32) for _ in range(NUM_SEQUENCES)]
    groups = [
        Group(Prompt(i, 0, (), "", {}), (Rollout(row, mask, zeros, (), "stop"),), 0, -1) for i, row in enumerate(ids)
    ]
    samples = tuple(Sample(index, 0, LENGTH, 0.0) for index in range(NUM_SEQUENCES))
    normalizer = Normalizer(NUM_SEQUENCES, NUM_SEQUENCES * (LENGTH - 1), LENGTH, num_micro_batches=1)
    return RankBatch((MicroBatch(samples),), normalizer, 0), groups


def commit(path: Path, version: int) -> None:
    CheckpointStore(path).commit(version)


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(folder: Path, threads: Executor, driver: Executor, model: TinyModel, num_rounds: int) -> Measured:
    rank, (share, groups) = policy(folder, model), batch()
    store, measured = CheckpointStore(folder / "checkpoints"), Measured()

    def step() -> float:
        return timed(lambda: rank.step(share, *groups))

    def write() -> None:
        rank.write_snapshot(store.stage(rank.version))
        driver.submit(commit, store.path, rank.version).result()

    def save() -> None:
        rank.snapshot()
        write()

    for _ in range(2):
        step()
    measured.first_stall = timed(rank.snapshot)
    write()
    measured.num_bytes = sum(path.stat().st_size for path in store.open(store.versions()[-1]).rglob("*.safetensors"))
    source = torch.ones(measured.num_bytes // 4)
    target = torch.zeros_like(source)
    for _ in range(num_rounds):
        measured.steps += [step() for _ in range(NUM_STEPS)]
        measured.copies.append(timed(lambda: target.copy_(source)))
        measured.stalls.append(timed(rank.snapshot))
        version = rank.version
        started = time.perf_counter()
        writing = threads.submit(lambda: rank.write_snapshot(store.stage(version)))  # noqa: B023  it ends in this round

        def finish() -> None:
            writing.result()  # noqa: B023
            driver.submit(commit, store.path, version).result()  # noqa: B023
            measured.writes.append(time.perf_counter() - started)  # noqa: B023

        committed = threads.submit(finish)
        while not committed.done():
            measured.steps_while_writing.append(step())
        committed.result()
        step()
        measured.blocking.append(timed(save))
        step()
    return measured


def main() -> None:
    parser = parser_of("benchmarks.checkpoint", __doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds")
    size = (QUICK_MODEL, QUICK_ROUNDS) if parser.parse_args().quick else (MODEL, NUM_ROUNDS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    disable_progress_bar()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(2) as threads,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as driver,
    ):
        measured = measure(Path(folder), threads, driver, *size)
    Console().print(measured.table())
    print(json.dumps(measured.figures()))


if __name__ == "__main__":
    main()
