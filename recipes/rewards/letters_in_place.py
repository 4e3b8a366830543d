"""Partial credit for spelling: the share of letters that stand where they belong."""


def letters_in_place(completions: list[str], answer: list[str], **kwargs: object) -> list[float]:
    """Letters in their place, over the longer of completion and answer, so that padding an answer never pays.

    >>> letters_in_place(["nus", "nun", "nussss", ""], answer=["nus"] * 4)
    [1.0, 0.6666666666666666, 0.5, 0.0]
    """
    scores = []
    for completion, expected in zip(completions, answer, strict=True):
        right = sum(ours == theirs for ours, theirs in zip(completion, expected, strict=False))
        scores.append(right / max(len(completion), len(expected)))
    return scores
