"""In every family of templates the assistant's tokens are found exactly, and no conversation begins with two BOS."""

from typing import Any

import pytest

from actors.data.chat import assistant_tokens
from actors.data.examples import ExampleStream
from actors.data.preferences import PairStream
from actors.data.prompts import PromptStream
from tests.actors.data.families import FAMILIES, FORGETFUL, MARKED, OPEN, WORDS_MARKED, Family
from tests.actors.data.test_prompts import ListRows, bos_tokenizer


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ONE_TURN = [said("user", "hi"), said("assistant", "ho")]
TURNS = [*ONE_TURN, said("user", "and\nthen?"), said("assistant", " un-\n\nusual ")]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def text(tokenizer: Any, token_ids: list[int], mask: Any, wanted: bool = True) -> str:
    return str(tokenizer.decode([token for token, is_said in zip(token_ids, mask, strict=True) if is_said is wanted]))


def spans(tokenizer: Any, token_ids: list[int], mask: list[bool]) -> list[str]:
    """The text of each run of tokens that are learned."""
    runs: list[list[int]] = []
    for place, (token, is_said) in enumerate(zip(token_ids, mask, strict=True)):
        if is_said and (place == 0 or not mask[place - 1]):
            runs.append([])
        if is_said:
            runs[-1].append(token)
    return [str(tokenizer.decode(run)) for run in runs]


@families
def test_the_assistants_tokens_are_its_words_and_what_closes_its_turn(family: Family) -> None:
    tokenizer = family.tokenizer()
    for talk in (ONE_TURN, TURNS):
        token_ids, mask = assistant_tokens(tokenizer, talk, "row 0")
        words = [message["content"] for message in talk if message["role"] == "assistant"]
        assert spans(tokenizer, token_ids, mask) == [family.before + word + family.closes for word in words]
        assert tokenizer.decode(token_ids) == tokenizer.apply_chat_template(talk, tokenize=False)


@families
def test_only_the_turns_after_the_prompt_are_learned(family: Family) -> None:
    tokenizer = family.tokenizer()
    rows = ListRows(({"prompt": TURNS[:3], "completion": TURNS[3:]},))
    example = ExampleStream(rows, tokenizer, 0, False, 400, assistant_only_loss=True).example(0)
    learned = text(tokenizer, example.token_ids_T.tolist(), example.loss_mask_T.tolist())
    assert learned == family.before + TURNS[3]["content"] + family.closes


@families
def test_whole_conversations_are_examples(family: Family) -> None:
    tokenizer = family.tokenizer()
    stream = ExampleStream(ListRows(({"messages": TURNS},)), tokenizer, 0, False, 400, assistant_only_loss=True)
    example = stream.example(0)
    assert spans(tokenizer, example.token_ids_T.tolist(), example.loss_mask_T.tolist()) == [
        family.before + message["content"] + family.closes for message in TURNS[1::2]
    ]


@families
@pytest.mark.parametrize("num_turns", [2, 4])
def test_of_a_completion_all_that_the_assistant_says_is_learned(family: Family, num_turns: int) -> None:
    """And nothing of what the user says in it, with and without `assistant_only_loss`."""
    tokenizer = family.tokenizer()
    rows = ListRows(({"prompt": TURNS[:1], "completion": TURNS[1:num_turns]},))
    for assistant_only in (False, True):
        example = ExampleStream(rows, tokenizer, 0, False, 400, assistant_only).example(0)
        token_ids, mask = example.token_ids_T.tolist(), example.loss_mask_T.tolist()
        prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(token_ids[: mask.index(True)]) == prompt
        assert spans(tokenizer, token_ids, mask) == [
            family.before + message["content"] + family.closes for message in TURNS[1:num_turns:2]
        ]
        assert tokenizer.decode(token_ids) == tokenizer.apply_chat_template(TURNS[:num_turns], tokenize=False)


@families
def test_no_bos_is_doubled(family: Family) -> None:
    """Neither where the template writes it, nor where the tokenizer adds it to plain text."""
    tokenizer = family.tokenizer()
    pairs = {"prompt": TURNS[:1], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}
    plain = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    sequences = [
        assistant_tokens(tokenizer, TURNS, "row 0")[0],
        list(PromptStream(ListRows(({"prompt": TURNS[:1]},)), tokenizer, 0, False, 400).prompt(0).token_ids),
    ]
    for row in (pairs, plain):
        pair = PairStream(ListRows((row,)), tokenizer, 0, False, 400).pair(0)
        sequences += [pair.chosen.token_ids_T.tolist(), pair.rejected.token_ids_T.tolist()]
    for token_ids in sequences:
        assert token_ids.count(tokenizer.bos_token_id) == (family.bos is not None)
        assert family.bos is None or token_ids[0] == tokenizer.bos_token_id


def test_a_template_that_doubles_bos_is_refused() -> None:
    family = FAMILIES["Llama 3"]
    doubled = family.tokenizer("{{ bos_token }}" + family.template)
    with pytest.raises(ValueError, match="row 0: the prompt begins with two BOS tokens"):
        assistant_tokens(doubled, TURNS, "row 0")


def test_a_template_that_marks_what_the_assistant_says_is_believed() -> None:
    tokenizer = FAMILIES["ChatML"].tokenizer(MARKED)
    found = assistant_tokens(tokenizer, TURNS, "row 0")
    assert spans(tokenizer, *found) == ["ho<|im_end|>", " un-\n\nusual <|im_end|>"]
    rows = ListRows(({"prompt": TURNS[:3], "completion": TURNS[3:]},))
    example = ExampleStream(rows, tokenizer, 0, False, 400).example(0)
    assert spans(tokenizer, example.token_ids_T.tolist(), example.loss_mask_T.tolist()) == [" un-\n\nusual <|im_end|>"]


def test_what_closes_a_turn_is_learned_though_the_mark_leaves_it_out() -> None:
    tokenizer = FAMILIES["ChatML"].tokenizer(WORDS_MARKED)
    for talk in (TURNS, [*TURNS, said("user", "and now?")]):
        token_ids, mask = assistant_tokens(tokenizer, talk, "row 0")
        assert spans(tokenizer, token_ids, mask) == ["ho<|im_end|>", " un-\n\nusual <|im_end|>"]
        assert tokenizer.decode(token_ids) == tokenizer.apply_chat_template(talk, tokenize=False)


def test_what_opens_the_next_turn_is_not_learned_where_none_is_closed() -> None:
    """EOS ends the last one."""
    tokenizer = FAMILIES["ChatML"].tokenizer(OPEN)
    assert spans(tokenizer, *assistant_tokens(tokenizer, TURNS, "row 0")) == ["ho", " un-\n\nusual <|im_end|>"]


BAD = {
    "forgets": (TURNS, FAMILIES["ChatML"].tokenizer(FORGETFUL), "differently when others follow.*% generation %"),
    "no template": (TURNS, bos_tokenizer(None), "row 0: .*no chat template"),
    "assistant first": (TURNS[1:], FAMILIES["ChatML"].tokenizer(), "row 0: the conversation begins with the assistant"),
    "marked from the first token on": (
        TURNS[1:2],
        FAMILIES["ChatML"].tokenizer(
            "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
        ),
        "row 0: the conversation begins with what the assistant says",
    ),
    "refused": (TURNS[:1] * 2, FAMILIES["Mistral"].tokenizer(), "row 0: .*roles must alternate"),
    "nothing said": (TURNS[:1], FAMILIES["ChatML"].tokenizer(), "row 0: the assistant says nothing"),
}


@pytest.mark.parametrize(("talk", "tokenizer", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_told_is_refused(talk: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assistant_tokens(tokenizer, talk, "row 0")


def test_whole_conversations_need_the_key() -> None:
    with pytest.raises(ValueError, match="set assistant_only_loss to true"):
        ExampleStream(ListRows(({"messages": TURNS},)), FAMILIES["ChatML"].tokenizer(), 0, False, 400)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "row 0: assistant_only_loss learns from conversations"),
        ({"messages": "a"}, "row 0: 'messages' must be a list of messages"),
        ({"messages": TURNS * 40}, "row 0: prompt and completion have .* raise max_length"),
    ],
)
def test_rows_without_an_assistant_are_refused(row: dict[str, Any], message: str) -> None:
    stream = ExampleStream(ListRows((row,)), FAMILIES["ChatML"].tokenizer(), 0, False, 400, assistant_only_loss=True)
    with pytest.raises(ValueError, match=message):
        stream.preflight()
