"""The score that a reasoning-gym task itself gives to an answer, between 0 and 1.

dataset:
  path: reasoning_gym:spell_backward
  size: 20000
rewards:
  functions:
    - function: recipes/rewards/reasoning_gym_score.py:reasoning_gym_score
"""

import functools
import json
from typing import Any

from reasoning_gym.factory import DATASETS


def reasoning_gym_score(
    completions: list[str] | list[list[dict[str, str]]],
    entry: list[dict[str, Any]],
    task: list[str],
    settings: list[dict[str, Any]] | None = None,
    **kwargs: Any,
) -> list[float]:
    """Each completion, stripped of blanks, scored by `score_answer` of its task.

    `entry`, `task` and `settings` are columns that every `reasoning_gym:<task>` data set has.

    >>> entry = {"question": "Spell this word backward: sun", "answer": "nus", "metadata": {}}
    >>> reasoning_gym_score([" nus", "sun"], entry=[entry] * 2, task=["spell_backward"] * 2)
    [1.0, 0.3333333333333333]
    """
    settings = settings or [{}] * len(completions)
    return [
        float(_scorer(name, json.dumps(setting, sort_keys=True)).score_answer(_text(completion), row))
        for completion, row, name, setting in zip(completions, entry, task, settings, strict=True)
    ]


@functools.cache
def _scorer(task: str, settings: str) -> Any:
    """The task's data set; made once, because some read word lists. Some scorers depend on the settings."""
    dataset_type, config_type = DATASETS[task]
    return dataset_type(config=config_type(**json.loads(settings), seed=0))


def _text(completion: str | list[dict[str, str]]) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
