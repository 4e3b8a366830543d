"""How long things took in a finished run, as the `simulation` section of a recipe.

Decoding is measured group by group. A replica's slots are given to sequences in the order of arrival, so a group's
sequences have known starts once the groups before it are placed. The seconds per token with which the group ends when
it did end are its own, and are fitted over the number of sequences that ran meanwhile. Pauses for swaps are taken out
of the clock first. What began before the first update is left out of the fits: it pays for compilation.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, pstdev

from rich.console import Console
from rich.table import Table

from actors.recipe.plain_yaml import write
from actors.recipe.schema import GrpoRecipe
from algorithms.simulation.config import (
    CriticTimes,
    DecodeConfig,
    PublishConfig,
    RewardLatency,
    SimulationConfig,
    TraceLengths,
    TrainConfig,
)
from algorithms.simulation.result import SimulationResult
from algorithms.simulation.simulator import simulate
from deploy.simulate.record import GroupRecord, RunRecord, metric, read_run
from deploy.simulate.setup import setup_of


def calibrated(recipe: GrpoRecipe, folder: Path, save: Path | None) -> GrpoRecipe:
    """The recipe with the times of the run in the folder; prints how well they predict that run itself."""
    run = read_run(folder)
    config = fit(run)
    text = write({"simulation": config.model_dump(mode="json")})
    result = simulate(config, setup_of(run.recipe), tuple(group.lengths for group in run.groups))
    console = Console()
    console.print(_table(run, result))
    if save is None:
        console.print(f"# fitted to {folder}; paste it into a recipe\n{text}", soft_wrap=True, markup=False)
    else:
        try:
            save.write_text(f"# Fitted to {folder}.\n{text}", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--save {save}: cannot be written: {error.strerror}") from None
        console.print(f"fitted to {folder}: see {save}", soft_wrap=True, markup=False, highlight=False)
    return recipe.model_copy(update={"simulation": config})


def fit(run: RunRecord) -> SimulationConfig:
    """Every time that the run tells; failures are not among them."""
    scores_s = [group.score_s for group in run.groups]
    mean_s = fmean(scores_s)
    return SimulationConfig(
        lengths=TraceLengths(kind="trace", path=str(run.folder)),
        decode=fit_decode(run),
        train=fit_train(run),
        critic=fit_critic(run),
        reward=RewardLatency(
            kind="exponential" if pstdev(scores_s) > 0.5 * mean_s else "constant", mean_s=_short(mean_s)
        ),
        sync=fit_sync(run),
        filtered_share=run.filtered_share,
        prompt_length=round(fmean(group.num_prompt_tokens for group in run.groups)),
    )


# Decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """One group: its seconds per token, and the sequences that ran on its replica meanwhile, itself included."""

    token_s: float
    num_running: float
    weight: float
    """Tokens of its longest sequence: what the measurement rests upon."""


def fit_decode(run: RunRecord) -> DecodeConfig:
    """base_s and per_sequence_s by least squares over the groups."""
    recipe = run.recipe
    in_flight = recipe.staleness.in_flight_updates and recipe.staleness.max_staleness > 0
    pauses_s = metric(run, "sync/pause_s") if in_flight else []
    if in_flight and recipe.pools.rollout.colocate_with is not None:  # the pause follows upon a rest
        rests_s = metric(run, "sync/rest_s")
        if len(rests_s) != len(pauses_s):
            raise ValueError(f"{run.folder}: replicas were colocated in a part of the run; calibrate with another")
        pauses_s = [pause + rest for pause, rest in zip(pauses_s, rests_s, strict=True)]
    swaps = tuple(zip(run.swapped_s, pauses_s, strict=False))  # a run that was cut off may lack the last of one
    paces: list[Pace] = []
    for replica in {group.replica for group in run.groups}:
        groups = [_without_pauses(g, swaps) for g in run.groups if g.replica == replica]
        paces += group_paces(groups, recipe.rollout.max_num_seqs, run.swapped_s[0])
    if not paces:
        raise ValueError(f"{run.folder}: no group of more than one token was sampled after the first step")
    base_s, per_sequence_s = least_squares(
        [pace.num_running for pace in paces], [pace.token_s for pace in paces], [pace.weight for pace in paces]
    )
    return DecodeConfig(base_s=_short(base_s), per_sequence_s=_short(per_sequence_s))


def group_paces(groups: Sequence[GroupRecord], max_num_seqs: int, warm_s: float) -> list[Pace]:
    """The pace of each group of one replica that began after `warm_s`."""
    free = [float("-inf")] * max_num_seqs  # when each slot becomes free
    heapify(free)
    spans: list[tuple[GroupRecord, float, float]] = []  # group, its first start, its seconds per token
    starts, ends = [], []
    for group in sorted(groups, key=lambda g: g.started_s):
        began = [max(group.started_s, heappop(free) if free else group.started_s) for _ in group.lengths]
        # The last of its sequences ends when the group does.
        token_s = min(
            (group.generated_s - at) / length for at, length in zip(began, group.lengths, strict=True) if length
        )
        token_s = max(token_s, 0.0)
        spans.append((group, min(began), token_s))
        for at, length in zip(began, group.lengths, strict=True):
            starts.append(at)
            ends.append(at + length * token_s)
        for end in ends[-len(group.lengths) :][:max_num_seqs]:
            heappush(free, end)
    running = _Concurrency(starts, ends)
    return [
        Pace(token_s, running.mean(first, group.generated_s), float(max(group.lengths)))
        for group, first, token_s in spans
        if group.whole and first >= warm_s and token_s > 0 and max(group.lengths) > 1 and group.generated_s > first
    ]


class _Concurrency:
    """How many of some intervals cover a moment, averaged over time."""

    def __init__(self, starts: Sequence[float], ends: Sequence[float]) -> None:
        self._starts, self._ends = sorted(starts), sorted(ends)
        self._sum_starts = [0.0, *accumulate(self._starts)]
        self._sum_ends = [0.0, *accumulate(self._ends)]

    def mean(self, begin: float, end: float) -> float:
        return (self._covered(end) - self._covered(begin)) / (end - begin)

    def _covered(self, until: float) -> float:
        """Seconds that all intervals together cover before this moment."""
        started, ended = bisect_left(self._starts, until), bisect_right(self._ends, until)
        return (started - ended) * until - self._sum_starts[started] + self._sum_ends[ended]


def _without_pauses(group: GroupRecord, swaps: Sequence[tuple[float, float]]) -> GroupRecord:
    """The group on a clock that stands still during pauses: `swaps` holds the end of each and its seconds."""

    def clock(at: float) -> float:
        passed = 0.0
        for swap, pause in swaps:
            passed += min(max(0.0, at - (swap - pause)), pause)
        return at - passed

    return replace(group, started_s=clock(group.started_s), generated_s=clock(group.generated_s))


# Training and publication ----------------------------------------------------------------------------------------


def fit_train(run: RunRecord) -> TrainConfig:
    """Of the steps after the first, and after those in which the critic learned alone."""
    critic = run.recipe.critic
    first = 1 if critic is None else max(1, critic.warmup_steps)
    if len(run.steps) <= first:
        raise ValueError(f"{run.folder}: the policy has not learned in it yet (critic.warmup_steps: {first})")
    return _fit_pass(run, "time/policy_step_s", run.recipe.pools.policy.num_workers, first)


def fit_critic(run: RunRecord) -> CriticTimes:
    """The placeholders, where there was none."""
    pool = run.recipe.pools.critic
    if pool is None:
        return CriticTimes()
    values = _fit_pass(run, "time/critic_values_s", pool.num_workers)
    return CriticTimes(values=values, train=_fit_pass(run, "time/critic_step_s", pool.num_workers))


def _fit_pass(run: RunRecord, name: str, num_workers: int, first: int = 1) -> TrainConfig:
    """per_step_s and per_token_s by least squares over the steps."""
    seconds, so_far = metric(run, name)[first:], metric(run, "num_tokens")
    tokens = [after - before for before, after in zip([0.0, *so_far], so_far, strict=False)][first:]
    per_step_s, per_token_s = least_squares(tokens, seconds, [1.0] * len(tokens))
    return TrainConfig(per_step_s=_short(per_step_s), per_token_s=_short(per_token_s * num_workers))


def fit_sync(run: RunRecord) -> PublishConfig:
    """Medians: a publication that was late once says nothing of the others."""
    pause_s = median(metric(run, "sync/pause_s")[1:])
    total_s = median(metric(run, "sync/total_s")[1:])
    if not run.recipe.staleness.in_flight_updates:
        # The total then holds the time for which running requests were let finish, which is simulated.
        total_s = min(total_s, median(metric(run, "sync/stream_s")[1:]) + pause_s)
    return PublishConfig(pause_s=_short(pause_s), total_s=_short(max(total_s, pause_s)))


def least_squares(xs: Sequence[float], ys: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The constant and the slope of y over x, neither of them negative."""
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, x in zip(weights, xs, strict=True))
    if spread <= 1e-12 * total * mean_x**2:
        return max(0.0, mean_y), 0.0  # x does not vary, so nothing is known of the slope
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, xs, ys, strict=True)) / spread
    if slope <= 0.0:
        return max(0.0, mean_y), 0.0
    if slope * mean_x > mean_y:
        # Through the origin.
        squares = sum(w * x * x for w, x in zip(weights, xs, strict=True))
        return 0.0, max(0.0, sum(w * x * y for w, x, y in zip(weights, xs, ys, strict=True)) / squares)
    return mean_y - slope * mean_x, slope


def _short(value: float) -> float:
    """Three digits are more than the fit is good for."""
    return float(f"{value:.3g}")


# What it predicts ------------------------------------------------------------------------------------------------


def _table(run: RunRecord, result: SimulationResult) -> Table:
    table = Table(title=f"{run.folder}: predicted and measured", title_justify="left")
    table.add_column("")
    for name in ("predicted", "measured"):
        table.add_column(name, justify="right")
    table.add_row("mean step time", *(f"{s:.3g} s" for s in (predicted_step_s(result), measured_step_s(run))))
    measured = measured_staleness(run)
    for age in range(max(len(result.staleness), len(measured))):
        shares = [ages[age] if age < len(ages) else 0.0 for ages in (result.staleness, measured)]
        table.add_row(f"tokens of staleness {age}", *(f"{share:.1%}" for share in shares))
    return table


def predicted_step_s(result: SimulationResult) -> float:
    """Mean over the steps after the first."""
    times = [record.time_s for record in result.timeline]
    return (times[-1] - times[0]) / (len(times) - 1)


def measured_step_s(run: RunRecord) -> float:
    """Mean over the steps after the first."""
    return fmean(metric(run, "step_time")[1:])


def measured_staleness(run: RunRecord) -> list[float]:
    """Share of the tokens by age, over the steps."""
    prefix = "staleness/share/"
    ages = [int(name.removeprefix(prefix)) for step in run.steps for name in step if name.startswith(prefix)]
    if not ages:
        metric(run, f"{prefix}0")  # raises, and says what is missing
    return [fmean(float(step.get(f"{prefix}{age}", 0.0)) for step in run.steps) for age in range(max(ages) + 1)]
