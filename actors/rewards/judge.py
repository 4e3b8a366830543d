"""A judge says which of two completions is better; as a reward the better one has 1, the other 0, and neither a number
where the judge does not say.

`def judge(prompts, pairs) -> list[int | None]`: for each prompt a pair of completions, and the place of the better one
in the pair, 0 or 1, or None; it may be `async`, and may have further parameters for columns of the data set. Which of
the two stands first is as good as random, and always the same for the same texts: a judge that prefers the first place
prefers nobody.
"""

import inspect
import json
import zlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any


def as_reward(judge: Callable[..., Any]) -> Callable[..., Any]:
    """The judge as a function that is called as TRL calls reward functions, with the two completions of a prompt."""
    parameters = inspect.signature(judge).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    taken = {parameter.name for parameter in parameters}

    def question(prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> dict[str, Any]:
        if len(completions) != 2:
            raise ValueError(f"a judge compares two completions of a prompt, not {len(completions)}")
        more = {name: values[:1] for name, values in columns.items() if takes_all or name in taken}
        turned = is_turned(completions)
        return {"prompts": [prompts[0]], "pairs": [list(completions)[:: -1 if turned else 1]], **more}

    if inspect.iscoroutinefunction(judge):

        @wraps(judge)
        async def asked(
            prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **columns: Any
        ) -> list[float | None]:
            return scores(await judge(**question(prompts, completions, columns)), is_turned(completions))

        return asked

    @wraps(judge)
    def score(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any, **columns: Any
    ) -> list[float | None]:
        return scores(judge(**question(prompts, completions, columns)), is_turned(completions))

    return score


def is_turned(completions: Sequence[Any]) -> bool:
    """Whether the second completion is shown first."""
    return bool(zlib.crc32(json.dumps(list(completions)).encode()) & 1)


def scores(verdicts: Any, turned: bool) -> list[float | None]:
    """Of the two completions, in their own order; ValueError when the judge says something else."""
    if not (isinstance(verdicts, list | tuple) and len(verdicts) == 1):
        raise ValueError(f"a judge returns a list with one verdict for each pair, not {verdicts!r:.80}")
    (verdict,) = verdicts
    if verdict is None:
        return [None, None]
    if isinstance(verdict, bool) or verdict not in (0, 1):
        raise ValueError(f"a judge says 0, 1 or None of a pair, not {verdict!r:.80}")
    better = int(verdict) ^ turned
    return [float(better == 0), float(better == 1)]
