"""1 for the right answer and 0 for any other; the smallest reward function there is.

dataset:
  path: data/questions.jsonl        # lines such as {"prompt": "2 + 3 = ", "answer": "5"}
rewards:
  functions:
    - function: recipes/rewards/exact_match.py:exact_match
"""

from typing import Any


def exact_match(
    completions: list[str] | list[list[dict[str, str]]], answer: list[str], **kwargs: Any
) -> list[float | None]:
    """1.0 where the stripped completion is the `answer` of its row, None (unscorable) where the row has no answer.

    >>> exact_match(["5", " 5 ", "6", "7"], answer=["5", "5", "5", None])
    [1.0, 1.0, 0.0, None]
    """
    return [
        None if right is None else float(_text(completion) == str(right).strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def _text(completion: str | list[dict[str, str]]) -> str:
    return (completion if isinstance(completion, str) else completion[-1]["content"]).strip()
