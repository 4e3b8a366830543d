"""Each reward function is called on two rows where it will run, in a child process with its deadline."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.data.dataset import Rows, prompt_of, reward_column_names, reward_columns
from actors.data.prompts import prompt_ids, text_ids
from actors.recipe.rewards import LOAD_TIMEOUT_S, RewardConfig
from actors.recipe.schema import GrpoRecipe
from actors.reward import arguments_of
from actors.rewards.classifier import check_reward_model
from actors.rewards.docket import Outcome
from actors.rewards.functions import MEMORY, name_of
from actors.rewards.lane import Lane
from actors.rewards.process import ChildError
from actors.settings import reward_functions
from algorithms.types import Group, Prompt, Rollout
from deploy.doctor.check import Finding, failed, passed, skipped, warned
from deploy.doctor.data import rows_of
from deploy.train import words

_NUM_ROWS = 2
_NUM_COMPLETIONS = 2
"""Of each row: the right one and an empty one."""
_SLACK_S = 10.0
_MADE_UP = "42"
"""The completion of a row that has none of its own."""


_FIXES = {
    "timeout": "make it faster, or raise rewards.timeout_s",
    "memory": "let it take less, or raise rewards.max_memory_gb",
}
"""By the cause of the failure."""
_NO_LIMIT_FIX = (
    "let it take less: rewards.max_memory_gb sets no limit, so the machine (or ulimit, or its own code) did not give it"
)
"""Of `memory`, where the recipe has no limit to raise."""


def check_reward_function(recipe: GrpoRecipe, index: int) -> Finding:
    """The recipe's function `index`, on the first rows of its data set."""
    config = reward_functions(recipe)[index]
    if config.model is not None:
        check_reward_model(config.model)
        return passed(f"{config.model} is a reward model; its weights were not loaded here")
    rows = rows_of(recipe)
    if rows is None:
        return skipped("the data set could not be read")
    tokenizer, _ = words(recipe)
    calls = [arguments_of(*probe(rows, row, tokenizer)) for row in range(min(_NUM_ROWS, len(rows)))]
    has_answers = all(own_answer(rows.row(row)) is not None for row in range(len(calls)))
    columns = tuple(reward_column_names(rows.column_names))
    return called(config, calls, columns, recipe.rewards.timeout_s, has_answers, recipe.rewards.max_memory_gb)


def deadline_s(recipe: GrpoRecipe) -> float:
    return LOAD_TIMEOUT_S + (_NUM_ROWS + 1) * recipe.rewards.timeout_s + 30.0


def probe(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Group, list[str]]:
    """A group as a replica would give it: the row's own completion where it has one, and an empty one."""
    row, where = rows.row(index), f"{rows.source}: row {index}"
    text = prompt_of(row, "prompt", where)
    prompt = Prompt(index, 0, tuple(prompt_ids(tokenizer, text, where)), text, reward_columns(row, where))
    completions = [own_answer(row) or _MADE_UP, ""]
    return Group(prompt, tuple(_rollout(prompt, said, tokenizer) for said in completions), 0, 0), completions


def own_answer(row: Mapping[str, Any]) -> str | None:
    """The row's completion as text; None where it has none."""
    said = row.get("completion")
    if isinstance(said, list) and said and isinstance(said[-1], dict):
        said = said[-1].get("content")
    return said if isinstance(said, str) and said else None


def _rollout(prompt: Prompt, said: str, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    sampled = [*text_ids(tokenizer, said, "a completion", special_tokens=False), int(tokenizer.eos_token_id)]
    token_ids = [*prompt.token_ids, *sampled]
    return Rollout(
        token_ids_T=np.array(token_ids, np.int32),
        loss_mask_T=np.arange(len(token_ids)) >= len(prompt.token_ids),
        logprobs_T=np.zeros(len(token_ids), np.float32),
        spans=(),
        finish_reason="stop",
    )


def called(
    config: RewardConfig,
    calls: Sequence[str],
    columns: tuple[str, ...],
    timeout_s: float,
    has_answers: bool,
    max_memory_gb: float | None = None,
) -> Finding:
    """What a function gave: each of `calls` (JSON, as a reward worker writes it) once, and the first one again."""
    lane = Lane((config.source,), timeout_s, 1, columns, max_memory_gb)
    outcomes: list[Outcome] = []
    try:
        lane.load().result(LOAD_TIMEOUT_S + _SLACK_S)
        for arguments in [*calls, calls[0]]:
            asked = lane.ask([[0]], arguments, _NUM_COMPLETIONS)
            outcomes.append(asked.result(LOAD_TIMEOUT_S + timeout_s + _SLACK_S)[0])
            cause, detail = outcomes[-1].cause, outcomes[-1].detail
            if cause is not None:
                fix = _FIXES.get(cause, "mend the function")
                if cause == MEMORY and max_memory_gb is None:
                    fix = _NO_LIMIT_FIX
                return failed(f"{config.source}: {cause}: {detail}", f"{fix}; its completions would be unscorable")
    except ChildError as error:
        return Finding("fail", f"{config.source}: {error.cause}: {error}")
    finally:
        lane.close()
    return judged(name_of(config.source), [outcome.scores for outcome in outcomes], has_answers)


def judged(name: str, scores: Sequence[tuple[float | None, ...]], has_answers: bool) -> Finding:
    """`scores` of each call: of the row's own answer, then of an empty one; the last call repeats the first.

    Where not `has_answers`, the first completions are made up as well, and nothing speaks for them.
    """
    *given, again = scores
    if all(score is None for pair in given for score in pair):
        return warned(f"{name} gives no score to {len(given)} rows", "see whether it finds what it looks for")
    if given[0] != again:
        return warned(
            f"{name} gives {_shown(given[0])} and then {_shown(again)} for the same completions",
            "seed it: a reward that changes is noise in every advantage",
        )
    own, empty = ([pair[place] for pair in given] for place in (0, 1))
    first = "the first rows' own answers" if has_answers else f"'{_MADE_UP}'"
    text = f"{name}: {_shown(own)} for {first}, {_shown(empty)} for empty ones"
    if has_answers and _mean(own) < _mean(empty):
        return warned(text, "see whether its sign is right")
    return passed(text)


def _mean(scores: Sequence[float | None]) -> float:
    numbers = [score for score in scores if score is not None]
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def _shown(scores: Sequence[float | None]) -> str:
    return ", ".join("none" if score is None else f"{score + 0.0:.3g}" for score in scores)
