"""A rollout's reward is what the reward functions gave it, or None; a function that fails never gives 0.

The functions run in a child process (rewards/lane.py), so one that hangs, crashes or changes global state costs its own
score, and no other's. Async ones are called for many groups at a time, sync ones, which hold their process, for one
group after another; a recipe that has both has a child for each kind, so that what fails in the one costs the other
nothing. The reward is the weighted sum over the functions that gave a number, None when none did: TRL's rule. Where a
function that counts has failed there is no reward either, however many others gave a number: a sum without it is a sum
in which it said 0.
"""

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from actors.recipe.rewards import RewardConfig
from actors.rewards.docket import Outcome
from actors.rewards.functions import name_of
from actors.rewards.lane import Lane
from actors.rewards.process import ChildError
from algorithms.types import Group, ScoredGroup


class RewardActor:
    """Scores groups, side by side as far as their functions are async; several actors score side by side."""

    def __init__(
        self,
        functions: tuple[RewardConfig, ...],
        timeout_s: float,
        max_concurrent_groups: int = 1,
        max_memory_gb: float | None = None,
    ) -> None:
        """`max_concurrent_groups`: whose async functions are called at one time; `max_memory_gb`: of each child."""
        self._sources = tuple(config.source for config in functions)
        self._names = score_names(self._sources)
        self._weights = tuple(config.weight for config in functions)
        self._timeout_s = timeout_s
        self._max_concurrent_groups = max_concurrent_groups
        self._max_memory_gb = max_memory_gb
        self._first = self._lane(self._sources)
        self._second: Lane | None = None  # for the async functions, when there are others
        self._reported: set[tuple[str, str]] = set()

    async def ping(self) -> int:
        """The process answers, with its number, whatever its child does; one that can score no more ends instead."""
        if not all(lane.lives for lane in (self._first, self._second) if lane is not None):
            os._exit(1)  # and is started again
        return os.getpid()

    async def check(self) -> None:
        """Returns when all functions are loaded; ValueError says which one cannot be, and why."""
        try:
            lanes = await self._loaded()
            for lane, _ in lanes:
                await asyncio.wrap_future(lane.load())
        except ChildError as error:
            raise ValueError(str(error)) from error

    async def score(self, group: Group, completions: list[str]) -> ScoredGroup:
        """The group with its rewards; each function takes at most `timeout_s`, whatever it does."""
        assert len(completions) == len(group.rollouts), "one text per rollout"
        arguments = arguments_of(group, completions)
        outcomes = await self._outcomes(arguments, len(completions))
        scores = [outcome.scores for outcome in outcomes]
        rewards_G, num_overflows = total_rewards(scores, self._weights, unscorable(outcomes, self._weights))
        failures = Counter(outcome.cause for outcome in outcomes if outcome.cause is not None)
        if num_overflows:
            failures["bad_output"] += 1
        return ScoredGroup(
            group=group,
            rewards_G=rewards_G,
            scores=dict(zip(self._names, (outcome.scores for outcome in outcomes), strict=True)),
            failures=dict(failures),
            completions=tuple(completions),
            notes=tuple(self._news(outcomes)),
            details=tuple(self._details(outcomes).values()),
        )

    def close(self) -> None:
        """End the children, and all calls that are in progress; the actor scores nothing after this."""
        self._first.close()
        if self._second is not None:
            self._second.close()

    def _lane(self, sources: tuple[str, ...]) -> Lane:
        return Lane(sources, self._timeout_s, self._max_concurrent_groups, max_memory_gb=self._max_memory_gb)

    async def _loaded(self) -> list[tuple[Lane, list[list[int]]]]:
        """The children, and which functions are called in which, step after step; ChildError before one has loaded."""
        is_async = await asyncio.wrap_future(self._first.load())
        alone, together = steps_of(is_async)
        if not (alone and together):
            return [(self._first, alone or [together])]
        if self._second is None:
            sources = tuple(self._sources[index] for index in together)
            self._second = self._lane(sources)
            self._second.load()  # what becomes of that is told by the first call
        return [(self._first, alone), (self._second, [together])]

    async def _outcomes(self, arguments: str, num_completions: int) -> list[Outcome]:
        """One outcome per function, by its place in the recipe."""
        try:
            lanes = await self._loaded()
        except ChildError as error:  # nothing is known of the functions yet, so the failure is that of all
            return [Outcome((None,) * num_completions, error.cause, str(error))] * len(self._names)
        outcomes: dict[int, Outcome] = {}
        for lane, steps in lanes:
            # The second child knows its own functions alone, the first knows all.
            places = {index: place for place, index in enumerate(steps[0])} if lane is self._second else {}
            asked = [[places.get(index, index) for index in step] for step in steps]
            found = await asyncio.wrap_future(lane.ask(asked, arguments, num_completions))
            outcomes |= {index: found[places.get(index, index)] for step in steps for index in step}
        return [outcomes[index] for index in range(len(self._names))]

    def _news(self, outcomes: Sequence[Outcome]) -> Iterator[str]:
        """What went wrong, once for each function and cause; how often is in the metrics. And what a child tells."""
        for lane in (self._first, self._second):
            while lane is not None and lane.news:
                yield lane.news.popleft()
        for key, detail in self._details(outcomes).items():
            if key not in self._reported:
                self._reported.add(key)
                yield detail

    def _details(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], str]:
        """What went wrong, by function and cause."""
        return {
            (name, outcome.cause): f"reward function {name}: {outcome.cause}: {outcome.detail}"
            for name, outcome in zip(self._names, outcomes, strict=True)
            if outcome.cause is not None
        }


def score_names(functions: Sequence[str]) -> tuple[str, ...]:
    """The name of each function's scores: its own, or the whole `file.py:name` where two functions share a name."""
    counts = Counter(name_of(function) for function in functions)
    names = tuple(name_of(function) if counts[name_of(function)] == 1 else function for function in functions)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"rewards.functions: {repeated[0]} is named twice; name it once, with the sum of the weights")
    return names


def arguments_of(group: Group, completions: Sequence[str]) -> str:
    """What the child makes a call of, as JSON; a conversation is continued by an assistant's message, as in TRL."""
    conversational = not isinstance(group.prompt.text, str)
    return json.dumps(
        {
            "prompt": group.prompt.text,
            "completions": [
                [{"role": "assistant", "content": text}] if conversational else text for text in completions
            ],
            "completion_ids": [rollout.completion_ids for rollout in group.rollouts],
            "columns": dict(group.prompt.columns),
        }
    )


def steps_of(is_async: Sequence[bool]) -> tuple[list[list[int]], list[int]]:
    """The sync functions, which are called one after another, and then all async ones together (TRL gathers them)."""
    return (
        [[index] for index, each in enumerate(is_async) if not each],
        [index for index, each in enumerate(is_async) if each],
    )


def unscorable(outcomes: Sequence[Outcome], weights: Sequence[float]) -> frozenset[int]:
    """Rollouts that a function has failed for, and has no score of; one of weight 0, which is only measured, costs
    nobody the reward."""
    failed = [outcome.scores for outcome, weight in zip(outcomes, weights, strict=True) if outcome.cause and weight]
    return frozenset(place for scores in failed for place, score in enumerate(scores) if score is None)


def total_rewards(
    scores: Sequence[Sequence[float | None]], weights: Sequence[float], without: Collection[int] = ()
) -> tuple[tuple[float | None, ...], int]:
    """The weighted sum for each rollout over the functions that gave a number, and how many sums overflowed.

    None where no function that counts gave a number (one of weight 0 does not, unless all are), where the sum is not
    finite, and for the rollouts `without` one.
    """
    rewards: list[float | None] = []
    num_overflows = 0
    for place, of_rollout in enumerate(zip(*scores, strict=True)):
        scored = [(weight, score) for weight, score in zip(weights, of_rollout, strict=True) if score is not None]
        parts = [weight * score for weight, score in scored if weight or not any(weights)]
        total = sum(parts)
        num_overflows += not math.isfinite(total)
        rewards.append(total if parts and math.isfinite(total) and place not in without else None)
    return tuple(rewards), num_overflows
