"""A call of a reward function has arguments of its own, and its output becomes scores or the reason why there are none.

In the child process, where the output's own code may do what it likes.
"""

import copy
import inspect
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.rewards.functions import MEMORY, checked_scores, describe

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Raised:
    """A call that raised, in place of its output."""

    detail: str
    cause: str = "exception"


def raised(error: BaseException, file: str | None = None) -> Raised:
    """What a call has raised, `memory` by a name of its own; `file` is where the user's code is."""
    detail = describe(error, file)
    if not isinstance(error, MemoryError):
        return Raised(detail)
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = "" if limit == resource.RLIM_INFINITY else f" (rewards.max_memory_gb is {limit / 10**9:g})"
    return Raised(f"{detail}{allowed}", MEMORY)


def keywords(arguments: dict[str, Any]) -> dict[str, list[Any]]:
    """The keywords of a call (TRL's contract): one item per completion, the prompt and the columns repeated."""
    num_completions = len(arguments["completions"])
    repeated = {"prompts": arguments["prompt"], **arguments["columns"]}
    return {
        **{name: [copy.deepcopy(value) for _ in range(num_completions)] for name, value in repeated.items()},
        "completions": arguments["completions"],
        "completion_ids": arguments["completion_ids"],
    }


def result_of(output: Any, num_completions: int) -> dict[str, Any]:
    """`scores` (a float or None per completion), `cause` (None, `exception`, `memory`, `bad_output`) and `detail`."""
    nothing = [None] * num_completions
    if isinstance(output, Raised):
        return {"scores": nothing, "cause": output.cause, "detail": output.detail}
    try:
        scores, problem = checked_scores(output, num_completions)
    except BaseException as error:  # noqa: BLE001 - looking at the output runs user code as well
        return {"scores": nothing, "cause": "bad_output", "detail": describe(error)}
    return {"scores": scores, "cause": "bad_output" if problem else None, "detail": problem}


def is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def file_of(function: RewardFunction) -> str | None:
    """Where the user's own code is."""
    own = inspect.unwrap(function)
    return own.__code__.co_filename if inspect.isfunction(own) else None
