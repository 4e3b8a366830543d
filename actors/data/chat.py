"""What the assistant says in a conversation is found as token ids, in the one rendering that the model is shown."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.data.prompts import conversation_ids, refuse_two_bos
from algorithms.types import Messages

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a chat template itself says what the assistant's tokens are."""


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, first: int = 0
) -> tuple[list[int], list[bool]]:
    """The conversation's token ids, and which of them the assistant says, in the messages from `first` on.

    Those are its words and the token that closes its turn: what it must produce, and what generation stops at. Role
    headers and line breaks between turns are not. ValueError names the row when they cannot be told apart.
    """
    token_ids = conversation_ids(tokenizer, messages, where, add_generation_prompt=False)
    refuse_two_bos(tokenizer, token_ids, where)
    start = _length_before(tokenizer, messages, token_ids, where, first)
    if tokenizer.chat_template and _MARKED.search(str(tokenizer.chat_template)):
        said = _marked(tokenizer, messages)
        learned = [token and place >= start for place, token in enumerate(said)]
    else:
        learned = [False] * len(token_ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index >= first:
                begin, end = _turn(tokenizer, messages, index, token_ids, where)
                learned[begin:end] = [True] * (end - begin)
    if not any(learned):
        raise ValueError(f"{where}: the assistant says nothing that could be learned; correct the row or remove it")
    return token_ids, learned


def _length_before(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, token_ids: list[int], where: str, first: int
) -> int:
    """Tokens of the messages before `first`."""
    if first == 0:
        return 0
    return len(_beginning(tokenizer, messages[:first], token_ids, where, add_generation_prompt=True))


def _turn(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, index: int, token_ids: list[int], where: str
) -> tuple[int, int]:
    """Where the assistant's message `index` begins and ends among the token ids."""
    if index == 0:
        raise ValueError(f"{where}: the conversation begins with the assistant; begin it with the user's message")
    begin = len(_beginning(tokenizer, messages[:index], token_ids, where, add_generation_prompt=True))
    after = _beginning(tokenizer, messages[: index + 1], token_ids, where, add_generation_prompt=False)
    return begin, begin + _closed(tokenizer, after[begin:])


def _beginning(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    token_ids: list[int],
    where: str,
    add_generation_prompt: bool,
) -> list[int]:
    """Token ids of the first messages; ValueError when those of the whole conversation do not begin with them."""
    beginning = conversation_ids(tokenizer, messages, where, add_generation_prompt)
    if token_ids[: len(beginning)] != beginning:
        raise ValueError(
            f"{where}: the chat template renders the first {len(messages)} message(s) differently when others follow, "
            "so the assistant's tokens cannot be told; use a chat template that does not, or one that marks them "
            "with {% generation %} and {% endgeneration %}"
        )
    return beginning


def _closed(tokenizer: PreTrainedTokenizerBase, turn: list[int]) -> int:
    """Tokens of a turn up to the special token that closes it, without the blanks that a template puts behind."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for end in range(len(turn), 0, -1):
        if turn[end - 1] in special:
            return end if not str(tokenizer.decode(turn[end:])).strip() else len(turn)
    return len(turn)


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[bool]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return [bool(token) for token in encoded["assistant_masks"]]
