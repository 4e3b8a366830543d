"""What the scheduler reaches under a hard staleness bound, beside the admission rules of three other systems.

    python -m benchmarks.pacing [--seeds N] [--steps N] [--skip-ray]

The load: 64 slots, groups of 8 completions, durations lognormal (sigma 1) and cut at 30 medians, K = 4, batches of 32
or 16 prompts, and a training step that takes just as long as generating a batch with all slots busy. Virtual time, our
real pacer and router. Efficiency is trained (not masked) slot-seconds / (slots x time). Every dispatched group is
trained, except where the table says otherwise. The first and the last steps, which fill and drain the pipeline, are
part of it: they cost one to two percent in a run of 150 steps and a few tenths of a percent in 800.

Rivals (benchmarks/rivals.py, which states the assumptions) run on the same draws. Their knob and their limit of
concurrent groups are both searched: what counts is the best throughput among all settings at which no trained token of
any seed was more than K versions old, as measured. Of ours nothing is searched: 32 groups in flight, the default of the
recipe, and the pipeline depth that `MODES` states. The ratio is the best of our modes / the best of theirs, at the load
where it is smaller. TRL reaches more than our pace mode, by throwing long groups away: see its length bias.

Last line: one JSON object.
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist, mean
from typing import Any

from rich.console import Console
from rich.table import Table

from algorithms.pacing import Pacer, WhenStale
from algorithms.routing import Router
from algorithms.simulation.config import (
    DecodeConfig,
    LognormalLengths,
    PublishConfig,
    RewardLatency,
    SimulationConfig,
    TrainConfig,
)
from algorithms.simulation.result import SimulationResult
from algorithms.simulation.setup import Setup
from algorithms.simulation.simulator import simulate
from algorithms.slots import Slot
from benchmarks.rivals import Areal, Rival, Trl, Verl
from benchmarks.usage import parser_of

K = 4
G = 8
NUM_SLOTS = 64
LIMIT = 4 * NUM_SLOTS // G
"""Groups in flight: the recipe's default for one replica."""
TOKENS_PER_MEDIAN = 1000
LONGEST = 30
"""Longest duration, in medians."""
LOADS = (32, 16)
"""Prompts in a batch."""
SCREENING_STEPS = 200
NO_BOUND = 10**6

console = Console()
if not console.is_terminal:
    console.width = 200


def mean_duration() -> float:
    """E[D] of the lognormal that is cut at 30 medians, in medians."""
    normal, cut = NormalDist(), math.log(LONGEST)
    return math.exp(0.5) * normal.cdf(cut - 1.0) + LONGEST * (1.0 - normal.cdf(cut))


def config(prompts: int, seed: int) -> SimulationConfig:
    """A median takes one second, however many sequences run; publishing and scoring take no time."""
    return SimulationConfig(
        lengths=LognormalLengths(
            kind="lognormal", median=TOKENS_PER_MEDIAN, sigma=1.0, max=LONGEST * TOKENS_PER_MEDIAN
        ),
        decode=DecodeConfig(base_s=1.0 / TOKENS_PER_MEDIAN, per_sequence_s=0.0),
        train=TrainConfig(per_step_s=prompts * G * mean_duration() / NUM_SLOTS, per_token_s=0.0),
        reward=RewardLatency(kind="constant", mean_s=0.0),
        sync=PublishConfig(pause_s=0.0, total_s=0.0),
        prompt_length=0,
        seed=seed,
    )


def setup(prompts: int, steps: int, **rule: Any) -> Setup:
    return Setup(
        steps=steps,
        groups_per_batch=prompts,
        num_generations=G,
        max_completion_length=LONGEST * TOKENS_PER_MEDIAN,
        num_replicas=1,
        max_num_seqs=NUM_SLOTS,
        **rule,
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over the seeds; the staleness is the highest of all."""

    efficiency: float
    max_staleness: int
    mean_staleness: float
    masked: float
    """Share of all slot-seconds that was trained with the tokens masked."""
    wasted: float
    """Share of all slot-seconds that was sampled and thrown away."""
    length_bias: float
    """Mean length of what was trained / of what was dispatched, less one."""

    @classmethod
    def of(cls, runs: Sequence[SimulationResult]) -> "Outcome":
        total = [run.num_slots * run.time_s for run in runs]
        return cls(
            efficiency=mean(run.efficiency for run in runs),
            max_staleness=max(run.max_staleness for run in runs),
            mean_staleness=mean(run.mean_staleness for run in runs),
            masked=mean(run.masked.slot_s / all_s for run, all_s in zip(runs, total, strict=True)),
            wasted=mean(
                sum(w.slot_s for w in run.wasted.values()) / all_s for run, all_s in zip(runs, total, strict=True)
            ),
            length_bias=mean(run.lengths_trained.mean / run.lengths_dispatched.mean for run in runs) - 1.0,
        )


# Ours ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of ours to keep the bound."""

    name: str
    when_stale: WhenStale = "pace"
    max_staleness: int = K
    batches_deep: int = K + 1
    """Pipeline depth in batches; K + 1 is the pacer's default."""

    def run(self, prompts: int, steps: int, seeds: int) -> Outcome:
        rule = setup(
            prompts,
            steps,
            max_groups_per_replica=LIMIT,
            max_staleness=self.max_staleness,
            when_stale=self.when_stale,
            pipeline_depth=min(self.batches_deep, self.max_staleness + 1) * prompts,
        )
        return Outcome.of([simulate(config(prompts, seed), rule) for seed in range(seeds)])


# With training and generation balanced to the percent, ready groups pile up to the depth. In mask mode they grow old
# there: at K batches deep fewer of their tokens are masked than at K + 1, where the last ones cannot be trained whole.
MODES = (
    Mode("pace"),
    Mode("mask", "mask", batches_deep=K),
    Mode("mask, default depth", "mask"),
    Mode("requeue", "requeue"),
    Mode("synchronous (K = 0)", max_staleness=0),
)


def best_mode(ours: dict[tuple[str, int], Outcome], prompts: int) -> str:
    return max((mode.name for mode in MODES), key=lambda name: ours[name, prompts].efficiency)


# Rivals ----------------------------------------------------------------------------------------------------------


class TooStaleError(Exception):
    """A token was trained more than K versions after it was sampled; the setting is out."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A rival with its knob and its limit of concurrent groups; None is its own default limit."""

    knob: float
    limit: int | None = None

    def __str__(self) -> str:
        return f"{self.knob:g}, " + ("default limit" if self.limit is None else f"{self.limit} groups at once")


@dataclass(frozen=True, slots=True)
class Contender:
    """A rival system, how its pacer is made, and what is searched."""

    name: str
    key: str
    knob: str
    make: Callable[..., Rival]
    default: float
    grid: tuple[float, ...]

    def simulate(self, setting: Setting, prompts: int, steps: int, seed: int, bounded: bool) -> SimulationResult:
        """`bounded`: stop with TooStaleError at the first token that is older than K."""
        pacer = self.make(setting.knob, groups_per_batch=prompts, num_batches=steps, max_in_flight=setting.limit)

        def check(_: int) -> None:
            if bounded and pacer.max_staleness_seen > K:
                raise TooStaleError

        rule = setup(prompts, steps, max_groups_per_replica=NO_BOUND, max_staleness=NO_BOUND)
        return simulate(config(prompts, seed), rule, pacer=pacer, on_step=check)

    def run(self, setting: Setting, prompts: int, steps: int, seeds: int, bounded: bool = False) -> Outcome:
        return Outcome.of([self.simulate(setting, prompts, steps, seed, bounded) for seed in range(seeds)])

    def best(self, prompts: int, steps: int, seeds: int) -> tuple[Setting, Outcome]:
        """The highest throughput at which every seed stays within K, as measured."""
        screened: list[tuple[float, Setting]] = []
        for setting in (Setting(knob, limit) for knob, limit in product(self.grid, (None, *LIMITS))):
            try:
                run = self.simulate(setting, prompts, min(steps, SCREENING_STEPS), 0, bounded=True)
            except TooStaleError:
                continue
            screened.append((run.efficiency, setting))
        for _, setting in sorted(screened, key=lambda pair: -pair[0]):
            try:
                return setting, self.run(setting, prompts, steps, seeds, bounded=True)
            except TooStaleError:
                continue
        raise AssertionError("a knob of 0 is synchronous and stays within every bound")


LIMITS = (8, 12, 16, 20, 24, 28, 32, 36, 40, 48, 64)
CONTENDERS = (
    Contender("AReaL", "vs_areal", "eta", Areal, 0, tuple(range(5))),
    Contender("TRL async GRPO", "vs_trl", "max_staleness", Trl, 4, tuple(range(6))),
    Contender("verl fully async", "vs_verl", "theta", Verl, 0.1, tuple(eighth / 8 for eighth in range(17))),
)


# Speed -----------------------------------------------------------------------------------------------------------


def decisions_per_s(num_replicas: int = 10_000, num_batches: int = 20, seed: int = 0) -> float:
    """Dispatches with their routes, finishes and takes, on one core; groups finish in random order."""
    pacer = Pacer(groups_per_batch=8000, max_staleness=K, num_batches=num_batches, max_in_flight=LIMIT * num_replicas)
    router, rng = Router(LIMIT), random.Random(seed)
    for replica in range(num_replicas):
        router.join(replica)
    in_flight: list[tuple[Slot, int, int]] = []
    num_decisions = version = 0
    started = time.perf_counter()
    while not pacer.exhausted:
        while (slot := pacer.dispatch(version)) is not None:
            tokens = rng.randrange(100, 2000)
            assigned = router.assign(tokens)
            assert assigned is not None
            in_flight.append((slot, assigned, tokens))
            num_decisions += 1
        for _ in range(min(len(in_flight), 2000)):
            index = rng.randrange(len(in_flight))
            in_flight[index], in_flight[-1] = in_flight[-1], in_flight[index]
            slot, replica, tokens = in_flight.pop()
            pacer.finished(slot, slot.version, version)
            router.done(replica, tokens)
            num_decisions += 1
        if pacer.take() is not None:
            num_decisions += 1
            version = pacer.next_version
    return num_decisions / (time.perf_counter() - started)


# Tables ----------------------------------------------------------------------------------------------------------

COLUMNS = ("prompts", "efficiency", "staleness max", "mean", "masked", "thrown away", "length bias")


def cells(prompts: int, outcome: Outcome) -> tuple[str, ...]:
    return (
        str(prompts),
        f"{outcome.efficiency:.3f}",
        str(outcome.max_staleness),
        f"{outcome.mean_staleness:.2f}",
        f"{outcome.masked:.1%}",
        f"{outcome.wasted:.1%}",
        f"{outcome.length_bias:+.1%}",
    )


def measure_ours(steps: int, seeds: int) -> dict[tuple[str, int], Outcome]:
    table = Table("ours", *COLUMNS, title=f"K = {K}, {NUM_SLOTS} slots, {LIMIT} groups in flight, {seeds} seeds")
    ours = {}
    for mode, prompts in product(MODES, LOADS):
        console.print(f"simulating {mode.name}, {prompts} prompts, {seeds} x {steps} steps")
        ours[mode.name, prompts] = outcome = mode.run(prompts, steps, seeds)
        table.add_row(mode.name, *cells(prompts, outcome))
    console.print(table)
    return ours


def measure_rivals(ours: dict[tuple[str, int], Outcome], steps: int, seeds: int) -> dict[str, float]:
    """For each rival the smaller of the two loads' ratios, ours / theirs."""
    best_names = ", ".join(f"{best_mode(ours, prompts)} at {prompts} prompts" for prompts in LOADS)
    title = f"Their rules on the same load; best of ours: {best_names}"
    table = Table("rival", "setting", *COLUMNS, "best of ours / this", "pace / this", title=title)
    ratios: dict[str, float] = {}
    for rival, prompts in product(CONTENDERS, LOADS):
        console.print(f"searching {rival.name}, {prompts} prompts, {len(rival.grid) * (len(LIMITS) + 1)} settings")
        best = ours[best_mode(ours, prompts), prompts].efficiency
        defaults = [Setting(rival.default)] + ([Setting(K)] if rival.default != K else [])
        for setting in defaults:
            outcome = rival.run(setting, prompts, steps, seeds)
            label = "as shipped" if setting.knob == rival.default else f"named like our K = {K}"
            table.add_row(rival.name, f"{label}: {rival.knob} {setting}", *cells(prompts, outcome))
        setting, outcome = rival.best(prompts, steps, seeds)
        ratio = best / outcome.efficiency
        label = f"best within {K}: {rival.knob} {setting}"
        pace = ours["pace", prompts].efficiency / outcome.efficiency
        table.add_row(rival.name, label, *cells(prompts, outcome), f"{ratio:.2f}", f"{pace:.2f}", style="bold")
        ratios[rival.key] = min(ratio, ratios.get(rival.key, math.inf))
    console.print(table)
    return ratios


def headline(ours: dict[tuple[str, int], Outcome]) -> dict[str, float]:
    pace, mask, default, _, synchronous = (mode.name for mode in MODES)
    return {
        **{f"efficiency_pace_{prompts}": ours[pace, prompts].efficiency for prompts in LOADS},
        **{f"efficiency_mask_{prompts}": ours[mask, prompts].efficiency for prompts in LOADS},
        **{f"efficiency_mask_default_depth_{prompts}": ours[default, prompts].efficiency for prompts in LOADS},
        "async_over_sync": min(ours[pace, p].efficiency / ours[synchronous, p].efficiency for p in LOADS),
        "max_staleness_seen": max(outcome.max_staleness for outcome in ours.values()),
        "max_staleness_allowed": K,
    }


def main() -> None:
    parser = parser_of("benchmarks.pacing", __doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--skip-ray", action="store_true", help="without the overhead of real Ray actors")
    arguments = parser.parse_args()
    started = time.monotonic()
    ours = measure_ours(arguments.steps, arguments.seeds)
    ratios = measure_rivals(ours, arguments.steps, arguments.seeds)
    speed = decisions_per_s()
    console.print(f"{speed:,.0f} decisions/s on one core with 10,000 replicas")
    result = headline(ours) | ratios | {"decisions_per_s": speed}
    if not arguments.skip_ray:
        from benchmarks.control_overhead import measure

        console.print("running the real controller on Ray")
        result |= measure(console)
    console.print(f"{time.monotonic() - started:.0f} s in all")
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
