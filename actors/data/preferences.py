"""`pair(ordinal)` and `judgement(ordinal)` are pure functions; both answers of a pair follow the same token ids.

A pair whose answers cannot be told from one common prompt is a ValueError that names the row, never trained as it is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.data.dataset import Rows, prompt_of
from actors.data.examples import answered, as_rollout
from actors.data.prompts import prompt_ids
from algorithms.order import row_of
from algorithms.types import Messages, Rollout

Answer = str | Messages


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, one of which is better."""

    chosen: Rollout
    rejected: Rollout
    margin: float | None
    """By how much, where the data say so."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer that is good or bad."""

    example: Rollout
    good: bool


@dataclass(frozen=True)
class PairStream:
    """Preference rows as pairs of sequences, by ordinal, each at most `max_length` tokens."""

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    seed: int
    shuffle: bool
    max_length: int

    def pair(self, ordinal: int) -> Pair:
        _, index = row_of(ordinal, len(self.rows), self.seed, self.shuffle)
        return self._pair_of_row(index)

    def preflight(self, num_rows: int = 256) -> None:
        """The first rows (all rows when fewer) make pairs, so bad data is a ValueError before GPUs are started."""
        for index in range(min(num_rows, len(self.rows))):
            self._pair_of_row(index)

    def _pair_of_row(self, index: int) -> Pair:
        where = f"{self.rows.source}: row {index}"
        row = self.rows.row(index)
        prompt, chosen, rejected = split_preference(row, where)
        given_ids = prompt_ids(self.tokenizer, prompt, where)
        answers = []
        for column, answer in (("chosen", chosen), ("rejected", rejected)):
            at = f"{where}: {column}"
            tokens = answered(self.tokenizer, prompt, given_ids, answer, at, column)
            answers.append(as_rollout(*tokens, self.max_length, at))
        if np.array_equal(answers[0].token_ids_T, answers[1].token_ids_T):
            raise ValueError(f"{where}: chosen and rejected are the same, so neither is better; remove the row")
        return Pair(answers[0], answers[1], _margin(row, where))


@dataclass(frozen=True)
class JudgementStream:
    """Rows with a label as sequences that are good or bad, by ordinal, each at most `max_length` tokens."""

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    seed: int
    shuffle: bool
    max_length: int

    def judgement(self, ordinal: int) -> Judgement:
        _, index = row_of(ordinal, len(self.rows), self.seed, self.shuffle)
        return self._judgement_of_row(index)

    def preflight(self, num_rows: int = 256) -> None:
        """The first rows (all rows when fewer) make judgements, so bad data is a ValueError before GPUs are started."""
        for index in range(min(num_rows, len(self.rows))):
            self._judgement_of_row(index)

    def _judgement_of_row(self, index: int) -> Judgement:
        where = f"{self.rows.source}: row {index}"
        row = self.rows.row(index)
        if not isinstance(row["label"], bool):
            raise ValueError(
                f"{where}: 'label' must be true (a good completion) or false, it is {str(row['label'])[:60]!r}; "
                "correct the row or remove it"
            )
        prompt, completion = prompt_of(row, "prompt", where), prompt_of(row, "completion", where)
        given_ids = prompt_ids(self.tokenizer, prompt, where)
        tokens = answered(self.tokenizer, prompt, given_ids, completion, where)
        return Judgement(as_rollout(*tokens, self.max_length, where), row["label"])


def mismatched(prompt_of: Rollout, completion_of: Rollout, max_length: int) -> Rollout:
    """One example's prompt with another's completion, which is cut where the sequence would be too long."""
    given_T = prompt_of.token_ids_T[: int(np.argmax(prompt_of.loss_mask_T))]
    # Between what is learned of a completion may stand what others say.
    kept = slice(int(np.argmax(completion_of.loss_mask_T)), None)
    completion_T, said_T = completion_of.token_ids_T[kept], completion_of.loss_mask_T[kept]
    room = max_length - len(given_T)
    learned_T = [False] * len(given_T) + said_T[:room].tolist()
    return as_rollout([*given_T, *completion_T[:room]], learned_T, max_length, "a completion of another prompt")


def split_preference(row: Mapping[str, Any], where: str) -> tuple[Answer, Answer, Answer]:
    """Prompt, chosen and rejected answer of a row.

    Without a prompt, or with one in text beside whole conversations, the prompt is what both answers begin with.
    """
    chosen, rejected = prompt_of(row, "chosen", where), prompt_of(row, "rejected", where)
    prompt = None if row.get("prompt") is None else prompt_of(row, "prompt", where)
    if type(chosen) is not type(rejected):
        raise ValueError(
            f"{where}: 'chosen' and 'rejected' must both be text or both be messages; correct the row or remove it"
        )
    if prompt is not None and not (isinstance(prompt, str) and isinstance(chosen, list)):
        return prompt, chosen, rejected
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _common_messages(chosen, rejected, where)
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)
    return _common_text(chosen, rejected, where)


def _common_messages(chosen: Messages, rejected: Messages, where: str) -> tuple[Messages, Messages, Messages]:
    shortest = min(len(chosen), len(rejected))
    shared = next((place for place in range(shortest) if chosen[place] != rejected[place]), shortest)
    if shared == 0:
        raise ValueError(
            f"{where}: chosen and rejected have no first message in common, which would be their prompt; add a column "
            "'prompt', or correct the row"
        )
    if shared == shortest:
        raise ValueError(
            f"{where}: of chosen and rejected one is the beginning of the other, so one answer is missing; correct the "
            "row or remove it"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _common_text(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    if shared > 0 and chosen[shared - 1] == " ":
        shared -= 1  # the blank belongs to the word behind it, for most tokenizers
    if shared == 0:
        raise ValueError(
            f"{where}: chosen and rejected begin with nothing in common, which would be their prompt; add a column "
            "'prompt', or correct the row"
        )
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same, so neither is better; remove the row")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _margin(row: Mapping[str, Any], where: str) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"{where}: 'margin' must be a number, it is {str(margin)[:60]!r}; correct the row")
    return float(margin)
