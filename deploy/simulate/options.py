"""Other settings of the same recipe on the same workers, each simulated over the same draws of lengths."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import ValidationError

from actors.recipe.schema import GrpoRecipe
from algorithms.simulation.lengths import Trace
from algorithms.simulation.result import SimulationResult
from algorithms.simulation.simulator import simulate
from deploy.simulate.setup import setup_of

_MAX_SPLITS = 7
_STALENESS = (0, 1, 2, 4, 8)
_MAX_SEQUENCES = 150_000
"""About a second of this machine for each option."""
_AS_FAST = 0.98
"""Options within this of the fastest are as fast; then fresher samples are better."""

Overrides = Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Option:
    """One setting and what became of it."""

    overrides: Overrides
    """What differs from the recipe; nothing is the recipe itself."""
    recipe: GrpoRecipe
    result: SimulationResult

    @property
    def arguments(self) -> str:
        """As they are typed on the command line."""
        return " ".join(f"{key}={'null' if value is None else value}" for key, value in self.overrides.items())


@dataclass(frozen=True, slots=True)
class Comparison:
    """The recipe as it is, other splits of its workers, and other pacing on the best split."""

    num_steps: int
    """Steps that each option was simulated for."""
    splits: tuple[Option, ...]
    """By the number of policy workers; the recipe as it is among them."""
    pacings: tuple[Option, ...]
    """On the best split."""

    @property
    def as_it_is(self) -> Option:
        return next(option for option in self.splits if not option.overrides)

    @property
    def best(self) -> Option:
        """Fastest of those that keep to the recipe's bound; the fresher of two that are as fast."""
        bound = self.as_it_is.recipe.staleness.max_staleness
        allowed = [o for o in (*self.splits, *self.pacings) if o.recipe.staleness.max_staleness <= bound]
        return _best(allowed)

    @property
    def staler(self) -> Option | None:
        """What a looser bound would give, if that is more."""
        option = _best([*self.splits, *self.pacings])
        return option if option.result.groups_per_s > self.best.result.groups_per_s / _AS_FAST else None


def compare(recipe: GrpoRecipe, trace: Trace, on_step: Callable[[int, int], None]) -> Comparison:
    """Simulate the options; `on_step` is told how many steps are done, and of how many."""
    num_steps = _num_steps(recipe)
    splits = _splits(recipe)
    done, total = 0, num_steps * (len(splits) + len(_pacings(recipe, {})))

    def run(options: list[Overrides]) -> tuple[Option, ...]:
        nonlocal done
        results = []
        for overrides in options:
            changed = _changed(recipe, overrides)
            if changed is not None:
                setup = replace(setup_of(changed), steps=num_steps)
                result = simulate(changed.simulation, setup, trace, partial(_shifted, on_step, done, total))
                results.append(Option(overrides, changed, result))
            done += num_steps
            on_step(done, total)
        return tuple(results)

    by_split = run(splits)
    return Comparison(num_steps, by_split, run(_pacings(recipe, _best(by_split).overrides)))


def _shifted(on_step: Callable[[int, int], None], before: int, total: int, step: int) -> None:
    """A step of one option as a step of all."""
    on_step(before + step, total)


def _best(options: list[Option] | tuple[Option, ...]) -> Option:
    fastest = max(option.result.groups_per_s for option in options)
    good = [option for option in options if option.result.groups_per_s >= _AS_FAST * fastest]
    return min(good, key=lambda o: (round(o.result.mean_staleness, 1), bool(o.overrides), -o.result.groups_per_s))


def _num_steps(recipe: GrpoRecipe) -> int:
    """As many as take about a second, but enough for the pipeline to fill and empty."""
    sequences = recipe.groups_per_batch * recipe.algorithm.num_generations
    return min(recipe.steps, max(2 * (recipe.staleness.max_staleness + 2), _MAX_SEQUENCES // sequences))


def _splits(recipe: GrpoRecipe) -> list[Overrides]:
    """Policy and rollout workers, on as many GPUs (or, without GPUs, workers) as the recipe gives both.

    Where they share them there is nothing to split.
    """
    policy, rollout = recipe.pools.policy, recipe.pools.rollout
    if rollout.colocate_with is not None:
        return [{}]
    each_policy, each_rollout = max(1, policy.gpus_per_worker), max(1, rollout.gpus_per_worker)
    total = policy.num_workers * each_policy + rollout.num_workers * each_rollout
    splits = []
    for num_rollout in range(1, (total - each_policy) // each_rollout + 1):
        num_policy, rest = divmod(total - num_rollout * each_rollout, each_policy)
        if rest == 0 and (num_policy, num_rollout) != (policy.num_workers, rollout.num_workers):
            splits.append({"pools.policy.num_workers": num_policy, "pools.rollout.num_workers": num_rollout})
    chosen: list[Overrides] = [{}, *_spread(splits, _MAX_SPLITS - 1)]
    return sorted(chosen, key=lambda split: split.get("pools.policy.num_workers") or policy.num_workers)


def _pacings(recipe: GrpoRecipe, split: Overrides) -> list[Overrides]:
    """Other bounds at their full depth, and shallower pipelines under the recipe's bound."""
    bound, batch = recipe.staleness.max_staleness, recipe.groups_per_batch
    bounds = [other for other in _STALENESS if other != bound and other <= max(2 * bound, 2)]
    depths = {batch * (bound + 1) * quarter // 4 for quarter in (1, 2, 3)} | {batch * bound}
    pacings: list[Overrides] = [
        {**split, "staleness.max_staleness": other, "staleness.pipeline_depth": None} for other in bounds
    ]
    full = None if recipe.staleness.pipeline_depth is None else {"staleness.pipeline_depth": None}
    pacings += [{**split, **full}] if full else []
    pacings += [
        {**split, "staleness.pipeline_depth": depth}
        for depth in sorted(depths)
        if depth >= batch and depth != recipe.pipeline_depth
    ]
    return pacings


def _spread(splits: list[dict[str, int]], count: int) -> list[dict[str, int]]:
    """At most `count` of them, evenly spaced, the extremes among them."""
    if len(splits) <= count:
        return splits
    return [splits[round(index * (len(splits) - 1) / (count - 1))] for index in range(count)]


def _changed(recipe: GrpoRecipe, overrides: Overrides) -> GrpoRecipe | None:
    """The recipe under the overrides; None when it would be refused."""
    tree: dict[str, Any] = recipe.model_dump()
    for key, value in overrides.items():
        *parents, name = key.split(".")
        at = tree
        for parent in parents:
            at = at[parent]
        at[name] = value
    try:
        return GrpoRecipe.model_validate(tree)
    except ValidationError:
        return None
