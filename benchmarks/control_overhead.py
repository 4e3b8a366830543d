"""What our control code costs: throughput of the real controller on real Ray, against what its sleeping workers allow.

    python -m benchmarks.control_overhead [--profile FILE]

Real: Ray, Controller, Attempts, AsyncPacer, Pacer, Router, Fleet, Ledger (with an fsync a step), advantages, packing.
Stand-ins: a replica is a Ray actor that holds S slots and sleeps 10 ms for each sequence; sequences queue for a slot as
in an engine. The policy sleeps for the training time in the controller's process; publishing is a call to each replica.

    bound = min(N / (G E[D]), B / T) groups per second,   overhead = 1 - throughput / bound

T leaves the policy a fifth of slack, so the bound is generation. An event loop's timer has a grain: a sleep of 10 ms
takes about 10.2 ms in a process that does nothing else, which is not ours to answer for. So D in `control_overhead` is
the median sleep of the same workers just before the run, when they only sleep. Beside it stand the overhead against the
nominal 10 ms, and against the mean sleep during the run, which also excuses delays by calls and by other processes. The
first and last steps, which fill and drain the pipeline, are left out. Median of three runs.
"""

import asyncio
import contextlib
import cProfile
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from actors.attempts import Attempts, Limits
from actors.controller import Controller
from actors.fleet import Fleet
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.router import Router
from algorithms.budgets import RewardBudget
from algorithms.config import GrpoConfig, StalenessConfig
from algorithms.costs import SequenceCosts
from algorithms.pacing import Pacer
from algorithms.types import Batch, GroupSummary, Prompt, Update
from benchmarks.usage import parser_of

NUM_REPLICAS = 2
NUM_SLOTS = 16
"""Of each replica."""
G = 8
SLEEP_S = 0.010
GROUPS_PER_BATCH = 32
MAX_STALENESS = 4
NUM_STEPS = 150
EDGE_STEPS = 10
"""Left out at either end."""
PROMPT_TOKENS = COMPLETION_TOKENS = 64
NUM_RUNS = 3
CALIBRATION_SLEEPS = 50
"""Of each slot."""

ROLLOUT_GROUPS_PER_S = NUM_REPLICAS * NUM_SLOTS / (G * SLEEP_S)
TRAIN_S = 0.8 * GROUPS_PER_BATCH / ROLLOUT_GROUPS_PER_S


@ray.remote(num_cpus=0)
class SleepingReplica:
    """Answers like actors.rollout.RolloutActor; at most S sequences sleep at once."""

    def __init__(self, replica: int) -> None:
        self._replica = replica
        self._slots = asyncio.Semaphore(NUM_SLOTS)
        self._version = 0
        self._num_slept, self._slept_s = 0, 0.0

    async def start(self) -> None:
        """There is no engine to build."""

    @ray.method(num_returns=2)
    async def fill(self, prompt: Prompt, attempt: int, partial: object = None) -> tuple[GroupSummary, bytes]:
        started = time.perf_counter()
        versions = await asyncio.gather(*(self._sequence() for _ in range(G)))
        summary = GroupSummary(
            ordinal=prompt.ordinal,
            epoch=prompt.epoch,
            attempt=attempt,
            replica=self._replica,
            num_tokens_G=(len(prompt.token_ids) + COMPLETION_TOKENS,) * G,
            num_loss_tokens_G=(COMPLETION_TOKENS,) * G,
            num_prompt_tokens=len(prompt.token_ids),
            truncated_G=(False,) * G,
            tokens_by_version_G=tuple({version: COMPLETION_TOKENS} for version in versions),
            rewards_G=tuple(float(index % 2) for index in range(G)),
            scores={"reward": tuple(float(index % 2) for index in range(G))},
            failures={},
            generate_s=time.perf_counter() - started,
            score_s=0.0,
        )
        tokens = bytes(G * (PROMPT_TOKENS + COMPLETION_TOKENS) * 9)  # id, log-probability and mask of each
        return summary, tokens

    async def _sequence(self) -> int:
        async with self._slots:
            version, started = self._version, time.perf_counter()
            await asyncio.sleep(SLEEP_S)
            self._slept_s += time.perf_counter() - started
            self._num_slept += 1
            return version

    async def swap(self, version: int) -> None:
        self._version = version

    async def timer_s(self) -> float:
        """What a sleep of `SLEEP_S` takes in this process when there is nothing else to do."""
        sleeps_s: list[float] = []

        async def slot() -> None:
            for _ in range(CALIBRATION_SLEEPS):
                started = time.perf_counter()
                await asyncio.sleep(SLEEP_S)
                sleeps_s.append(time.perf_counter() - started)

        await asyncio.gather(*(slot() for _ in range(NUM_SLOTS)))
        return median(sleeps_s)

    async def slept(self) -> tuple[int, float]:
        """Sleeps so far, and the seconds that they took."""
        return self._num_slept, self._slept_s


class Prompts:
    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(ordinal, 0, tuple(range(PROMPT_TOKENS)), "", {})


@dataclass(slots=True)
class SleepingPolicy:
    """Policy, publisher and reporter: what they take is sleep, and one call to each replica."""

    fleet: Fleet
    num_teams: int = 1
    costs: SequenceCosts = field(default_factory=SequenceCosts)
    max_completion_length: int = COMPLETION_TOKENS
    exclusive: asyncio.Lock = field(default_factory=asyncio.Lock)
    committed: int = 0
    done_at: list[float] = field(default_factory=list)

    async def step(self, batch: Batch, groups: Sequence[Any]) -> Update:
        await asyncio.sleep(TRAIN_S)
        return Update(batch.version, batch.version + 1, {})

    async def publish(self, version: int) -> None:
        members = self.fleet.members
        await asyncio.gather(*(replica.handle.swap.remote(version) for replica in members))
        self.fleet.serve(members)
        self.committed = version

    def admitting(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    def resting(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    async def settled(self, version: int) -> None:
        """There are no checkpoints."""

    async def report(self, groups: list[ReadyGroup], batch: Batch, update: Update) -> Mapping[str, float]:
        self.done_at.append(time.perf_counter())
        return update.metrics

    async def health(self, version: int, metrics: Mapping[str, float]) -> None:
        """Nothing is learned, so nothing goes wrong."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """One run."""

    groups_per_s: float
    timer_s: float
    """Median sleep of an idle worker."""
    measured_sleep_s: float
    """Mean sleep during the run."""
    rollout_idle_share: float
    """Share of the run in which no group was in flight."""

    def against(self, sleep_s: float) -> float:
        bound = min(NUM_REPLICAS * NUM_SLOTS / (G * sleep_s), GROUPS_PER_BATCH / TRAIN_S)
        return 1.0 - self.groups_per_s / bound


async def run(folder: Path, num_steps: int) -> Overhead:
    """A whole run of the real controller; Ray must be up."""
    replica_class: Any = SleepingReplica
    replicas = [replica_class.remote(index) for index in range(NUM_REPLICAS)]
    timer_s = median(await asyncio.gather(*(replica.timer_s.remote() for replica in replicas)))
    prompts: Any = Prompts()
    max_groups_per_replica = 4 * NUM_SLOTS // G  # as the recipe's default
    router = Router(
        max_groups_per_replica=max_groups_per_replica,
        num_generations=G,
        max_completion_length=COMPLETION_TOKENS,
    )
    fleet = Fleet(
        lambda number, bundle: replicas[number], NUM_REPLICAS, router, start_timeout_s=60.0, max_rebuilds=0, say=print
    )
    await fleet.start()
    policy: Any = SleepingPolicy(fleet)
    pacer = AsyncPacer(
        Pacer(
            groups_per_batch=GROUPS_PER_BATCH,
            max_staleness=MAX_STALENESS,
            num_batches=num_steps,
            max_in_flight=NUM_REPLICAS * max_groups_per_replica,
        ),
        stall_timeout_s=60.0,
    )
    started = time.perf_counter()
    with Ledger(folder / "ledger.jsonl") as ledger:
        limits = Limits(group_timeout_s=60.0, start_timeout_s=1.0, max_attempts=3, max_quarantined=0, max_bad_rows=0)
        controller = Controller(
            num_steps=num_steps,
            staleness=StalenessConfig(max_staleness=MAX_STALENESS),
            algorithm=GrpoConfig(),
            max_tokens_per_micro_batch=4096,
            pacer=pacer,
            attempts=Attempts(limits, None, RewardBudget(1.0), prompts, pacer, router, fleet, ledger),
            policy=policy,
            publisher=policy,
            ledger=ledger,
            depth=None,
            report=policy.report,
            health=policy.health,
            settled=policy.settled,
            stopped=policy.settled,
        )
        await controller.run()
        assert ledger.num_trained == num_steps * GROUPS_PER_BATCH
        assert not ledger.lost()
    seconds = time.perf_counter() - started
    slept = await asyncio.gather(*(replica.slept.remote() for replica in replicas))
    for replica in replicas:
        ray.kill(replica)
    edge = min(EDGE_STEPS, num_steps // 4)
    first, *_, last = policy.done_at[edge : len(policy.done_at) - edge]
    num_groups = (num_steps - 2 * edge - 1) * GROUPS_PER_BATCH
    num_slept, slept_s = (sum(column) for column in zip(*slept, strict=True))
    return Overhead(num_groups / (last - first), timer_s, slept_s / num_slept, pacer.waits["rollout/idle"] / seconds)


def measure(
    console: Console, num_runs: int = NUM_RUNS, num_steps: int = NUM_STEPS, profile: Path | None = None
) -> dict[str, float]:
    """The table, and the keys of the JSON object; starts and stops Ray."""
    os.environ.pop("RAY_ADDRESS", None)
    root = str(Path(__file__).parents[1])
    ray.init(
        "local",
        num_cpus=NUM_REPLICAS + 1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )
    profiler = cProfile.Profile()
    try:
        with profiler if profile else contextlib.nullcontext():
            runs = [_one_run(num_steps) for _ in range(num_runs)]
    finally:
        ray.shutdown()
    if profile:
        profiler.dump_stats(profile)
    console.print(_table(runs))
    return {
        "control_overhead": median(run.against(run.timer_s) for run in runs),
        "control_overhead_nominal": median(run.against(SLEEP_S) for run in runs),
        "control_overhead_by_sleep_in_run": median(run.against(run.measured_sleep_s) for run in runs),
    }


def _one_run(num_steps: int) -> Overhead:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder), num_steps))


def _table(runs: Sequence[Overhead]) -> Table:
    table = Table(
        "run", "groups/s", "bound at 10 ms", "overhead", "10 ms by the timer", "overhead", "in the run", "overhead",
        "no group in flight",
        title=f"{NUM_REPLICAS} replicas of {NUM_SLOTS} slots, groups of {G}, {SLEEP_S * 1e3:g} ms a sequence",
    )  # fmt: skip
    for index, one in enumerate(runs):
        table.add_row(
            str(index),
            f"{one.groups_per_s:.1f}",
            f"{ROLLOUT_GROUPS_PER_S:.1f}",
            f"{one.against(SLEEP_S):.1%}",
            f"{one.timer_s * 1e3:.2f} ms",
            f"{one.against(one.timer_s):.1%}",
            f"{one.measured_sleep_s * 1e3:.2f} ms",
            f"{one.against(one.measured_sleep_s):.1%}",
            f"{one.rollout_idle_share:.1%}",
        )
    return table


def main() -> None:
    parser = parser_of("benchmarks.control_overhead", __doc__)
    parser.add_argument("--runs", type=int, default=NUM_RUNS)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--profile", type=Path, help="write a cProfile of the controller's process there")
    arguments = parser.parse_args()
    result = measure(Console(), arguments.runs, arguments.steps, arguments.profile)
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
