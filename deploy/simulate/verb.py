"""The simulate verb: how fast a recipe would run, what would limit it, and which settings would suit it better."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from actors.recipe.schema import GrpoRecipe
from algorithms.simulation.config import SimulationConfig
from algorithms.simulation.result import Sample, SimulationResult
from algorithms.simulation.simulator import simulate
from deploy.simulate.options import Comparison, Option, compare
from deploy.simulate.plot import plot_simulation
from deploy.simulate.setup import setup_of, trace_of

_REASONS = {
    "depth": "pipeline_depth is reached",
    "capacity": "the replicas hold all the groups that they may",
    "bound": "another group could not be trained within max_staleness",
    "done": "the run ends",
    "publishing": "the weights are swapped",
    "turns": "the policy has the GPUs",
    "failed": "dead replicas",
    "groups": "too few groups are ready",
    "oldest": "the oldest group is not finished",
    "critic": "the critic values the batch, or still learns",
}
_BAR_WIDTH = 40


def show(recipe: GrpoRecipe, plot: Path | None) -> None:
    """Simulate, print, and draw; ValueError when something is wrong with the recipe."""
    console = Console()
    trace = trace_of(recipe)
    with _progress("simulating") as report:
        result = simulate(recipe.simulation, setup_of(recipe), trace, lambda done: report(done, recipe.steps))
    with _progress("comparing") as report:
        comparison = compare(recipe, trace, report)
    for table in (_figures(result), _idle(result), _staleness(result), _costs(result)):
        console.print(table)
    console.print(_options(comparison))
    for line in (*_notes(recipe, result), _advice(comparison)):
        # A line that is to be copied must not be wrapped at the width of the terminal.
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if plot is not None:
        plot_simulation(result, comparison, plot)
        console.print(f"picture: {plot}", soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, only where somebody looks on."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)


# Tables ----------------------------------------------------------------------------------------------------------


def _figures(result: SimulationResult) -> Table:
    table = _table(f"{result.steps} steps in virtual time", "", "value")
    seconds, bound = result.time_s, result.bound
    limit = "rollouts" if bound.rollout < bound.policy else "policy"
    table.add_row("time", f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds:.1f} s")
    table.add_row("step time", f"{result.step_time_s:.3g} s")
    table.add_row("trained", f"{result.groups_per_s:.4g} groups/s, {result.trained.tokens / seconds:,.0f} tokens/s")
    table.add_row("bound", f"{bound.groups_per_s:.4g} groups/s, by the {limit}")
    table.add_row("", f"(rollouts {bound.rollout:.4g}, policy {bound.policy:.4g} groups/s)")
    table.add_row("share of the bound", f"{result.share_of_bound:.1%}")
    table.add_row("trained slot-seconds of all", f"{result.efficiency:.1%}")
    return table


def _idle(result: SimulationResult) -> Table:
    table = _table("where the time goes", "pool", "", "share")
    policy = result.policy_s
    table.add_row("policy", "trains", f"{policy.get('training', 0.0) / result.time_s:.1%}")
    table.add_row("", "publishes", f"{policy.get('publishing', 0.0) / result.time_s:.1%}")
    waits = {reason: policy[reason] for reason in ("groups", "oldest", "critic") if reason in policy}
    _add_reasons(table, waits, result.time_s)
    table.add_section()
    slot_s = result.num_slots * result.time_s
    table.add_row("rollout slots", "decode", f"{1 - sum(result.slot_idle_s.values()) / slot_s:.1%}")
    _add_reasons(table, result.slot_idle_s, slot_s)
    return table


def _add_reasons(table: Table, seconds: Mapping[str, float], whole: float) -> None:
    for reason, idle_s in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row("", f"idle ({reason}): {_REASONS[reason]}", f"{idle_s / whole:.1%}")


def _staleness(result: SimulationResult) -> Table:
    table = _table("staleness of the trained tokens", "versions", "share", "")
    table.columns[2].justify = "left"
    for age, share in enumerate(result.staleness):
        table.add_row(str(age), f"{share:.1%}", "█" * round(share * _BAR_WIDTH))
    table.add_row("mean", f"{result.mean_staleness:.2f}", "")
    return table


def _costs(result: SimulationResult) -> Table:
    table = _table("what was sampled", "", "tokens", "of all slot-seconds")
    amounts = {"trained": result.trained, "masked": result.masked, **result.wasted, "unfinished": result.unfinished}
    for cause, amount in amounts.items():
        if amount.tokens or cause == "trained":
            share = amount.slot_s / (result.num_slots * result.time_s)
            table.add_row(cause, f"{amount.tokens:,}", f"{share:.1%}")
    return table


def _options(comparison: Comparison) -> Table:
    table = _table(f"other settings, {comparison.num_steps} steps each", "", "policy", "rollout", "max_staleness",
                   "pipeline_depth", "groups/s", "step s", "staleness", "policy idle", "slots idle")  # fmt: skip
    best = comparison.best
    for options in (comparison.splits, comparison.pacings):
        for option in options:
            notes = ["best"] * (option is best) + ["as it is"] * (not option.overrides)
            _add_option(table, option, ", ".join(notes))
        table.add_section()
    return table


def _add_option(table: Table, option: Option, note: str) -> None:
    recipe, result = option.recipe, option.result
    waits = sum(result.policy_s.get(reason, 0.0) for reason in ("groups", "oldest", "critic", "publishing"))
    idle = sum(result.slot_idle_s.values()) / (result.num_slots * result.time_s)
    table.add_row(
        note,
        str(recipe.pools.policy.num_workers),
        str(recipe.pools.rollout.num_workers),
        str(recipe.staleness.max_staleness),
        str(recipe.pipeline_depth),
        f"{result.groups_per_s:.4g}",
        f"{result.step_time_s:.3g}",
        f"{result.mean_staleness:.2f}",
        f"{waits / result.time_s:.0%}",
        f"{idle:.0%}",
    )


def _table(title: str, first: str, *others: str) -> Table:
    """Words to the left, figures to the right."""
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="left" if name == "" else "right")
    return table


# Sentences -------------------------------------------------------------------------------------------------------


def _notes(recipe: GrpoRecipe, result: SimulationResult) -> Iterator[str]:
    """What must be known to read the tables."""
    defaults, config = SimulationConfig(), recipe.simulation
    if (config.decode, config.train) == (defaults.decode, defaults.train):
        yield (
            "note: the times are placeholders (a 7B model on H100-class GPUs); fit them to a run of yours with "
            "--calibrate RUN_DIR"
        )
    if recipe.pools.rollout.colocate_with is not None:
        yield "note: replicas and policy take turns; what waking up and computing KV cache again takes is not simulated"
        if recipe.staleness.max_staleness > 0 and not recipe.staleness.in_flight_updates:
            yield "note: without in_flight_updates a step first waits for running groups, which is not simulated either"
    if recipe.staleness.adapt_depth is not None:
        yield "note: staleness.adapt_depth follows what is learned, which is not simulated; the depth stays"
    if result.num_failures:
        yield f"replicas died {result.num_failures} times; {result.num_redispatched} attempts were second ones"
    yield f"completions: {_mean(result.lengths_dispatched)} tokens sampled, {_mean(result.lengths_trained)} trained"
    if result.lengths_trained.mean < 0.97 * result.lengths_dispatched.mean:
        yield "warning: long completions are trained less often than they are sampled"


def _mean(sample: Sample) -> str:
    return f"{sample.mean:.1f}"


def _advice(comparison: Comparison) -> str:
    now, best, staler = comparison.as_it_is, comparison.best, comparison.staler
    gain = best.result.groups_per_s / now.result.groups_per_s
    if not best.overrides:
        advice = "best of these within the recipe's bound: the recipe as it is"
    else:
        advice = (
            f"best of these within the recipe's bound: {gain:.2f} x the groups/s at a mean staleness of "
            f"{best.result.mean_staleness:.2f} instead of {now.result.mean_staleness:.2f}, with {best.arguments}"
        )
    if staler is not None:
        gain = staler.result.groups_per_s / now.result.groups_per_s
        advice += f"\nwith a looser bound: {gain:.2f} x the groups/s, with {staler.arguments}"
    return advice
