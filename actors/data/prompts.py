"""`prompt(ordinal)` is a pure function: the same ordinal is the same prompt after any restart.

Text is tokenized here, once; from here on token ids travel, so no second BOS can appear.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from actors.data.dataset import Rows, prompt_of, reward_columns
from algorithms.order import row_of
from algorithms.types import Messages, Prompt


@dataclass(frozen=True)
class PromptStream:
    """The prompts of a run by ordinal, in the order of `algorithms.order`, each at most `max_prompt_length` tokens."""

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    seed: int
    shuffle: bool
    max_prompt_length: int

    def prompt(self, ordinal: int) -> Prompt:
        """The prompt of an ordinal; ValueError names the row when it cannot be used."""
        epoch, index = row_of(ordinal, len(self.rows), self.seed, self.shuffle)
        return self._prompt_of_row(index, ordinal, epoch)

    def row(self, ordinal: int) -> int:
        """The row of the data set that makes the ordinal's prompt."""
        return row_of(ordinal, len(self.rows), self.seed, self.shuffle)[1]

    def preflight(self, num_rows: int = 256, max_bad_rows: int = 0) -> None:
        """The first rows (all rows when fewer) make prompts, so bad data is a ValueError before GPUs are started.

        Up to `max_bad_rows` of them may be bad: the run will set those aside.
        """
        if max_bad_rows >= len(self.rows):
            raise ValueError(
                f"dataset.max_bad_rows: {max_bad_rows} would let every row of {self.rows.source} be bad, which has "
                f"{len(self.rows)}; lower it"
            )
        num_bad = 0
        for index in range(min(num_rows, len(self.rows))):
            try:
                self._prompt_of_row(index, ordinal=index, epoch=0)
            except ValueError as error:
                num_bad += 1
                if num_bad > max_bad_rows:
                    raise ValueError(over_budget(error, max_bad_rows)) from error

    def _prompt_of_row(self, index: int, ordinal: int, epoch: int) -> Prompt:
        where = f"{self.rows.source}: row {index}"
        row = self.rows.row(index)
        text = prompt_of(row, "prompt", where)
        if not any(said.strip() for said in ([text] if isinstance(text, str) else [m["content"] for m in text])):
            raise ValueError(f"{where}: the prompt is empty, there is nothing to answer; correct the row or remove it")
        token_ids = prompt_ids(self.tokenizer, text, where)
        if len(token_ids) > self.max_prompt_length:
            raise ValueError(
                f"{where}: the prompt has {len(token_ids)} tokens, generation.max_prompt_length allows "
                f"{self.max_prompt_length}; raise generation.max_prompt_length to {len(token_ids)} or remove the row"
            )
        return Prompt(ordinal, epoch, tuple(token_ids), text, reward_columns(row, where))


def over_budget(error: ValueError, max_bad_rows: int) -> str:
    """The sentence for the bad row that is one too many."""
    return f"{error}; dataset.max_bad_rows allows {max_bad_rows} such rows"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, where: str) -> list[int]:
    """Token ids that a completion can follow: strings with the tokenizer's own special tokens, conversations by the
    chat template, up to the point where the assistant speaks. ValueError when they are empty, begin with two BOS
    tokens or end with EOS."""
    if isinstance(prompt, str):
        token_ids = text_ids(tokenizer, prompt, where, special_tokens=True)
    elif prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: the prompt ends with the assistant's own message, which would be answered by the assistant "
            "again; end the prompt with the user's message, and put the answer into 'completion'"
        )
    else:
        token_ids = conversation_ids(tokenizer, prompt, where, add_generation_prompt=True)
    if not token_ids:
        raise ValueError(f"{where}: the prompt is empty, there is nothing to continue; correct the row or remove it")
    refuse_two_bos(tokenizer, token_ids, where)
    if isinstance(prompt, str) and token_ids[-1] == tokenizer.eos_token_id and not _ends_with_eos(tokenizer, prompt):
        raise ValueError(
            f"{where}: the tokenizer ends the prompt with EOS '{tokenizer.eos_token}', so nothing would follow; "
            "set add_eos_token to false in the model's tokenizer_config.json"
        )
    return token_ids


def refuse_two_bos(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], where: str) -> None:
    """ValueError when a text that brings its own BOS was given another by the tokenizer or the chat template."""
    if tokenizer.bos_token_id is not None and token_ids[:2] == [tokenizer.bos_token_id] * 2:
        raise ValueError(
            f"{where}: the prompt begins with two BOS tokens '{tokenizer.bos_token}', which the model has never seen; "
            "remove the token from the text of the row, where the tokenizer or the chat template adds it already"
        )


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, where: str, special_tokens: bool) -> list[int]:
    """Token ids of plain text; ValueError when it is no text (a lone surrogate has no UTF-8 form)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text is not valid Unicode ({error}); repair its encoding") from error
    return _flat(tokenizer(text, add_special_tokens=special_tokens))


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, add_generation_prompt: bool
) -> list[int]:
    """Token ids of a conversation, rendered and tokenized by the chat template in one go, so no special token is
    added to those that the template writes."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: the row is a conversation, but the model's tokenizer has no chat template; use an instruct "
            "model, give it one (model.chat_template, or chat_template.jinja in its folder), or write the prompts as "
            "strings"
        )
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the text is not valid Unicode ({error}); repair its encoding") from error
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A template is a program over what the row holds: a `tool_calls` that is a number raises what Python does.
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{where}: the chat template refuses the conversation ({error}), its roles are {roles}; correct the row"
        ) from error
    return _flat(encoded)


def _ends_with_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return text.rstrip().endswith(str(tokenizer.eos_token))


def _flat(encoded: Any) -> list[int]:
    return [int(token) for token in encoded["input_ids"]]
