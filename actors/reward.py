"""A rollout's reward is what the reward functions gave it, or None; a function that fails never gives 0.

The functions run in a child process (rewards/process.py), so one that hangs, crashes or changes global state costs its
own score and nothing else. Weighted sum over the functions that gave a number, None when none did: TRL's rule.
"""

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from actors.recipe.rewards import LOAD_TIMEOUT_S, RewardConfig
from actors.rewards.functions import name_of
from actors.rewards.process import ChildError, Outcome, RewardProcess
from algorithms.types import Group, ScoredGroup

T = TypeVar("T")


class RewardActor:
    """Scores groups, one after another; several actors score side by side."""

    def __init__(self, functions: tuple[RewardConfig, ...], timeout_s: float) -> None:
        self._names = score_names([config.source for config in functions])
        self._weights = tuple(config.weight for config in functions)
        self._timeout_s = timeout_s
        self._process = RewardProcess(tuple(config.source for config in functions))
        # One thread for the life of the actor: it orders the calls, and a child ends with the thread that started it.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")
        self._closed = False
        self._reported: set[tuple[str, str]] = set()

    async def ping(self) -> int:
        """The process answers, with its number, whatever its child does."""
        return os.getpid()

    async def check(self) -> None:
        """Returns when all functions are loaded; ValueError says which one cannot be, and why."""
        try:
            await self._in_thread(self._process.start, LOAD_TIMEOUT_S)
        except ChildError as error:
            raise ValueError(str(error)) from error

    async def score(self, group: Group, completions: list[str]) -> ScoredGroup:
        """The group with its rewards; each function takes at most `timeout_s`, whatever it does."""
        assert len(completions) == len(group.rollouts), "one text per rollout"
        arguments = arguments_of(group, completions)
        outcomes = await self._in_thread(self._outcomes, arguments, len(completions))
        rewards_G, num_overflows = total_rewards([outcome.scores for outcome in outcomes], self._weights)
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
        """End the child, and a call that is in progress; the actor scores nothing after this."""
        self._closed = True
        self._process.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._process.kill()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _outcomes(self, arguments: str, num_completions: int) -> list[Outcome]:
        """One outcome per function, by its place in the recipe; a failed child is replaced before the next call."""
        outcomes: dict[int, Outcome] = {}
        nothing = (None,) * num_completions
        while len(outcomes) < len(self._names):
            # Before the first start nothing is known of the functions, and a failure is the failure of all.
            called = [index for index in range(len(self._names)) if index not in outcomes]
            try:
                self._process.start(LOAD_TIMEOUT_S)
                called = next_call(self._process.is_async, done=outcomes.keys())
                outcomes |= zip(called, self._process.call(called, arguments, self._timeout_s), strict=True)
            except ChildError as error:
                if self._closed:
                    raise RuntimeError("the reward actor is closed") from error
                outcomes |= {index: Outcome(nothing, error.cause, str(error)) for index in called}
        return [outcomes[index] for index in range(len(self._names))]

    def _news(self, outcomes: Sequence[Outcome]) -> Iterator[str]:
        """What went wrong, once for each function and cause; how often is in the metrics."""
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


def next_call(is_async: Sequence[bool], done: Collection[int]) -> list[int]:
    """The functions to call together: the next sync one alone, and then all async ones (TRL gathers them)."""
    left = [index for index in range(len(is_async)) if index not in done]
    sync = [index for index in left if not is_async[index]]
    return sync[:1] or left


def total_rewards(
    scores: Sequence[Sequence[float | None]], weights: Sequence[float]
) -> tuple[tuple[float | None, ...], int]:
    """The weighted sum for each rollout over the functions that gave a number, and how many sums overflowed.

    None where no function gave a number, and where the sum is not finite.
    """
    rewards: list[float | None] = []
    num_overflows = 0
    for of_rollout in zip(*scores, strict=True):
        parts = [weight * score for weight, score in zip(weights, of_rollout, strict=True) if score is not None]
        total = sum(parts)
        num_overflows += not math.isfinite(total)
        rewards.append(total if parts and math.isfinite(total) else None)
    return tuple(rewards), num_overflows
