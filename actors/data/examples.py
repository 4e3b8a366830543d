"""`example(ordinal)` is a pure function, and its loss is on what the model must say: the completion alone.

Of text that is the whole completion and EOS, of a conversation the assistant's words and what closes its turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.data.chat import assistant_tokens
from actors.data.dataset import Rows, prompt_of
from actors.data.prompts import prompt_ids, text_ids
from actors.recipe.schema import GrpoRecipe
from algorithms.order import row_of
from algorithms.types import Messages, Rollout


@dataclass(frozen=True)
class ExampleStream:
    """Prompt-completion rows, or whole conversations, as sequences to learn from, each at most `max_length` tokens."""

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    seed: int
    shuffle: bool
    max_length: int
    assistant_only_loss: bool = False

    def __post_init__(self) -> None:
        columns = self.rows.column_names
        if "messages" in columns and "prompt" not in columns:
            if not self.assistant_only_loss:
                raise ValueError(
                    f"dataset.path: {self.rows.source} holds whole conversations ('messages'), of which only what the "
                    "assistant says can be learned; set assistant_only_loss to true, or split them into 'prompt' and "
                    "'completion'"
                )
        elif "completion" not in columns:
            raise ValueError(
                f"dataset.path: {self.rows.source} has no column 'completion', which supervised fine-tuning learns; "
                f"its columns are {', '.join(columns)}; rename the one that holds the completion"
            )

    def example(self, ordinal: int) -> Rollout:
        """The example of an ordinal as a rollout that nobody sampled: no version spans, log-probabilities 0."""
        _, index = row_of(ordinal, len(self.rows), self.seed, self.shuffle)
        return self._example_of_row(index)

    def preflight(self, num_rows: int = 256) -> None:
        """The first rows (all rows when fewer) make examples, so bad data is a ValueError before GPUs are started."""
        for index in range(min(num_rows, len(self.rows))):
            self._example_of_row(index)

    def _example_of_row(self, index: int) -> Rollout:
        where = f"{self.rows.source}: row {index}"
        row = self.rows.row(index)
        if "prompt" not in row:
            messages = prompt_of(row, "messages", where)
            if not isinstance(messages, list):
                raise ValueError(f"{where}: 'messages' must be a list of messages; correct the row or remove it")
            return as_rollout(*assistant_tokens(self.tokenizer, messages, where), self.max_length, where)
        prompt, completion = prompt_of(row, "prompt", where), prompt_of(row, "completion", where)
        if self.assistant_only_loss and not (isinstance(prompt, list) and isinstance(completion, list)):
            raise ValueError(
                f"{where}: assistant_only_loss learns from conversations, and 'prompt' or 'completion' is text; write "
                "both as messages, or set assistant_only_loss to false"
            )
        given_ids = prompt_ids(self.tokenizer, prompt, where)
        return as_rollout(*answered(self.tokenizer, prompt, given_ids, completion, where), self.max_length, where)


def data_examples(recipe: GrpoRecipe, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> ExampleStream | None:
    """What a run learns of the data's completions beside its samples; None when nothing."""
    if recipe.distillation is None or recipe.distillation.lmbda == 1:
        return None
    longest = recipe.generation.max_prompt_length + recipe.generation.max_completion_length
    try:
        return ExampleStream(rows, tokenizer, recipe.seed, recipe.dataset.shuffle, longest)
    except ValueError as error:
        raise ValueError(
            f"distillation.lmbda: {recipe.distillation.lmbda:g} learns from the data, too: {error}"
        ) from None


def as_rollout(token_ids: Sequence[int], learned_T: Sequence[bool], max_length: int, where: str) -> Rollout:
    """A sequence that nobody sampled, whose loss is on the tokens in `learned_T`; ValueError when it is too long."""
    num_tokens = len(token_ids)
    if num_tokens > max_length:
        raise ValueError(
            f"{where}: prompt and completion have {num_tokens} tokens, max_length allows {max_length}; raise "
            f"max_length to {num_tokens} or remove the row"
        )
    return Rollout(
        token_ids_T=np.array(token_ids, dtype=np.int32),
        loss_mask_T=np.array(learned_T, dtype=bool),
        logprobs_T=np.zeros(num_tokens, dtype=np.float32),
        spans=(),
        finish_reason="stop",
    )


def answered(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Messages,
    given_ids: list[int],
    completion: str | Messages,
    where: str,
    column: str = "completion",
) -> tuple[list[int], list[bool]]:
    """Token ids of the prompt, whose are `given_ids`, with the completion, and which of them are learned.

    Of text that is all of the completion and one EOS; of messages what the assistant says in the completion.
    """
    if isinstance(prompt, list) and isinstance(completion, list):
        return assistant_tokens(tokenizer, prompt + completion, where, len(prompt), given_ids)
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise ValueError(
            f"{where}: 'prompt' and '{column}' must both be text or both be messages; correct the row or remove it"
        )
    assert tokenizer.eos_token_id is not None
    # Tokenized apart from the prompt, as it is when the policy samples it: no token spans the border.
    learned_ids = text_ids(tokenizer, completion, where, special_tokens=False)
    if learned_ids[-1:] != [tokenizer.eos_token_id]:
        learned_ids.append(tokenizer.eos_token_id)
    return given_ids + learned_ids, [False] * len(given_ids) + [True] * len(learned_ids)
