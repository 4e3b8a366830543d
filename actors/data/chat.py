"""What the assistant says in a conversation is found as token ids, in the one rendering that the model is shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.data.prompts import conversation_ids, refuse_two_bos
from algorithms.types import Messages

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag by which a chat template itself says what the assistant's tokens are."""
_ASKED: Messages = [{"role": "user", "content": "?"}]
"""Rendered behind a conversation, to see what of its end is there only because nothing follows."""


def assistant_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    first: int = 0,
    given_ids: Sequence[int] = (),
) -> tuple[list[int], list[bool]]:
    """The conversation's token ids, and which of them the assistant says, in the messages from `first` on.

    Those are its words and the token that closes its turn: what it must produce, and what generation stops at. Role
    headers and line breaks between turns are not. Where the template closes the last turn with no special token, EOS
    does. `given_ids` are the ids of the messages before `first`, up to where the assistant speaks. ValueError names
    the row when the assistant's tokens cannot be told apart.
    """
    token_ids = conversation_ids(tokenizer, messages, where, add_generation_prompt=False)
    refuse_two_bos(tokenizer, token_ids, where)
    if token_ids[: len(given_ids)] != list(given_ids):
        raise ValueError(
            f"{where}: the chat template renders the prompt differently when the completion follows, so the "
            "completion cannot be told from the prompt; use a chat template (model.chat_template) whose generation "
            "prompt begins the assistant's turn, and a completion that begins with an assistant message without "
            "leading blanks"
        )
    talk = _Talk(tokenizer, messages, token_ids, _special_ids(tokenizer), where)
    begin = len(given_ids)
    if tokenizer.chat_template and _MARKED.search(str(tokenizer.chat_template)):
        said = talk.closed(_marked(tokenizer, messages))
        learned = [token and place >= begin for place, token in enumerate(said)]
        if learned[:1] == [True]:
            raise ValueError(f"{where}: the conversation begins with what the assistant says; begin it with the user's")
        ends_open = any(learned) and messages[-1]["role"] == "assistant"
    else:
        learned = [False] * len(token_ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index >= first:
                begin = len(given_ids) if index == first and given_ids else talk.begin(index)
                end = talk.end(index, begin)
                learned[begin:end] = [True] * (end - begin)
        ends_open = messages[-1]["role"] == "assistant"
    if ends_open and not talk.closers(token_ids[begin:]):
        token_ids, learned = [*token_ids, int(tokenizer.eos_token_id)], [*learned, True]
    if not any(learned):
        raise ValueError(f"{where}: the assistant says nothing that could be learned; correct the row or remove it")
    return token_ids, learned


@dataclass(frozen=True, slots=True)
class _Talk:
    """A conversation and its one rendering, in which turns are found by rendering the conversation up to them."""

    tokenizer: PreTrainedTokenizerBase
    messages: Messages
    token_ids: list[int]
    special: frozenset[int]
    where: str

    def begin(self, index: int) -> int:
        """Where the assistant's message `index` begins among the token ids."""
        if index == 0:
            raise ValueError(
                f"{self.where}: the conversation begins with the assistant; begin it with the user's message"
            )
        before = self._rendered(self.messages[:index], add_generation_prompt=True)
        if self.token_ids[: len(before)] != before:
            raise ValueError(
                f"{self.where}: the chat template begins the assistant's message {index} otherwise than it prompts the "
                "model for it, so the model would never be asked for what it learns; use a chat template "
                "(model.chat_template) whose generation prompt begins the assistant's turn, and a message without "
                "leading blanks"
            )
        return len(before)

    def end(self, index: int, begin: int) -> int:
        """Behind the token that closes it."""
        if index == len(self.messages) - 1:
            turn = self.token_ids[begin:]
            closers = self.closers(turn)
            return begin + (self._last_that_stays(closers, begin) + 1 if closers else len(turn))
        alone = self._rendered(self.messages[: index + 1], add_generation_prompt=False)
        end = _num_alike(alone, self.token_ids)
        # What some templates write only where nothing follows, such as EOS, is not in the middle; words always are.
        if end < begin or (end == begin and alone[end:]) or not self._is_blank(alone[end:]):
            raise ValueError(
                f"{self.where}: the chat template renders the assistant's message {index} differently when others "
                "follow, so the assistant's tokens cannot be told; put all before the last turn into 'prompt' and "
                "learn that turn alone, or use a chat template (model.chat_template) that renders every turn as it was "
                "said, or one that marks what is said with {% generation %} and {% endgeneration %}"
            )
        closers = self.closers(self.token_ids[begin:end])
        return begin + closers[0] + 1 if closers else end

    def closers(self, turn: list[int]) -> list[int]:
        """Places of the special tokens at a turn's end, the last one first, with nothing but blanks between them."""
        places = range(len(turn) - 1, -1, -1)
        tail = takewhile(lambda place: turn[place] in self.special or self._is_blank([turn[place]]), places)
        return [place for place in tail if turn[place] in self.special]

    def closed(self, said: list[bool]) -> list[bool]:
        """What the template marks, and the special token right behind a mark that holds none that closes.

        Where nothing is behind the last turn, the template closes none, and what is behind others opens the next.
        """
        ends = [place + 1 for place in range(len(said)) if said[place] and not any(said[place + 1 : place + 2])]
        closed = list(said)
        for end in ends:
            begin = end - sum(1 for _ in takewhile(bool, reversed(said[:end])))
            if self.token_ids[end : end + 1] and self.token_ids[end] in self.special:
                closed[end] = not self.closers(self.token_ids[begin:end])
        ends_open = self.messages[-1]["role"] == "assistant" and ends[-1:] == [len(said)]
        return list(said) if ends_open else closed

    def _last_that_stays(self, closers: list[int], begin: int) -> int:
        """Of several at the end of the conversation, the last that is there when the user goes on, too."""
        if len(closers) == 1:
            return closers[0]
        try:
            longer = self._rendered([*self.messages, *_ASKED], add_generation_prompt=False)
        except ValueError:  # the template lets nobody go on
            return closers[0]
        num_alike = _num_alike(longer, self.token_ids) - begin
        return next((place for place in closers if place < num_alike), closers[0])

    def _is_blank(self, token_ids: list[int]) -> bool:
        """Nothing but special tokens and white space."""
        return not str(self.tokenizer.decode([token for token in token_ids if token not in self.special])).strip()

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> list[int]:
        return conversation_ids(self.tokenizer, messages, self.where, add_generation_prompt)


def _num_alike(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    assert tokenizer.eos_token_id is not None
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return frozenset(special | {int(tokenizer.eos_token_id)})


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[bool]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    return [bool(token) for token in encoded["assistant_masks"]]
