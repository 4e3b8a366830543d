"""Both answers of a pair follow the same token ids, whatever the row looks like, and bad rows are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.data.dataset import load_rows
from actors.data.preferences import JudgementStream, Pair, PairStream, mismatched
from actors.model.tiny import byte_tokenizer
from actors.recipe.data import DatasetConfig
from algorithms.types import Rollout
from tests.actors.data.families import FAMILIES
from tests.actors.data.test_prompts import ListRows

BYTES = byte_tokenizer(256)
ASKED = {"role": "user", "content": "hi"}
GOOD, BAD = {"role": "assistant", "content": "ho"}, {"role": "assistant", "content": "no"}


def stream(row: dict[str, Any], tokenizer: Any = BYTES, max_length: int = 100) -> PairStream:
    return PairStream(ListRows((row,)), tokenizer, 0, False, max_length)


def parts(rollout: Rollout) -> tuple[str, str]:
    """What both answers follow, and what is learned."""
    ids, mask = rollout.token_ids_T, rollout.loss_mask_T
    return str(BYTES.decode(ids[: int(np.argmax(mask))])), str(BYTES.decode(ids[mask]))


def answers(pair: Pair) -> tuple[str, str, str]:
    (prompt, chosen), (again, rejected) = parts(pair.chosen), parts(pair.rejected)
    assert prompt == again
    return prompt, chosen, rejected


CONVERSATION = (
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "ho<|im_end|>",
    "no<|im_end|>",
)
FORMS: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "plain": ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, ("1+1=", "2<eos>", "3<eos>")),
    "conversation": ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, CONVERSATION),
    "implicit conversation": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CONVERSATION),
    "text beside conversations": ({"prompt": "hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CONVERSATION),
    "implicit text": (
        {"chosen": "it is fine", "rejected": "it is foul"},
        ("it is f", "ine<eos>", "oul<eos>"),
    ),
    "implicit text up to a blank": (
        {"chosen": "the sky is blue", "rejected": "the sky is red"},
        ("the sky is", " blue<eos>", " red<eos>"),
    ),
    "an answer that ends at once": ({"prompt": "a", "chosen": "", "rejected": "b"}, ("a", "<eos>", "b<eos>")),
    "no prompt in this row": ({"prompt": None, "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CONVERSATION),
}


@pytest.mark.parametrize(("row", "expected"), FORMS.values(), ids=FORMS)
def test_both_answers_follow_one_prompt(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert answers(stream(row).pair(0)) == expected


def test_margins() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert [stream({**row, **more}).pair(0).margin for more in ({}, {"margin": None}, {"margin": 2})] == [None, None, 2]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_common_prefix_is_token_identical_in_every_family(family: Any) -> None:
    tokenizer = family.tokenizer()
    pair = stream({"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, tokenizer, 400).pair(0)
    lengths = [int(np.argmax(answer.loss_mask_T)) for answer in (pair.chosen, pair.rejected)]
    assert lengths[0] == lengths[1]
    assert (pair.chosen.token_ids_T[: lengths[0]] == pair.rejected.token_ids_T[: lengths[0]]).all()
    learned = tokenizer.decode(pair.chosen.token_ids_T[pair.chosen.loss_mask_T])
    assert learned == family.before + "ho" + family.closes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
    "the same, implicit": ({"chosen": "ab", "rejected": "ab"}, "chosen and rejected are the same"),
    "nothing in common": ({"chosen": "a", "rejected": "b"}, "begin with nothing in common.*add a column 'prompt'"),
    "no message in common": ({"chosen": [GOOD], "rejected": [BAD]}, "no first message in common"),
    "no answer": ({"chosen": [ASKED], "rejected": [ASKED, BAD]}, "one answer is missing"),
    "text and messages": ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "must both be text or both be messages"),
    "a prompt of messages": (
        {"prompt": [ASKED], "chosen": "b", "rejected": "c"},
        "chosen: 'prompt' and 'chosen' must both be text",
    ),
    "a number": ({"prompt": "a", "chosen": 3, "rejected": "c"}, "'chosen' must be text or a list of messages"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "c"}, "'chosen' must be text or a list of messages"),
    "too long": (
        {"prompt": "a", "chosen": "b" * 99, "rejected": "c"},
        "chosen: .* 101 tokens.*raise max_length to 101",
    ),
    "rejected too long": ({"prompt": "a", "chosen": "b", "rejected": "c" * 99}, "rejected: .* 101 tokens"),
    "empty prompt": ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    "assistant asks": ({"prompt": [ASKED, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "ends with the assistant's own"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "'margin' must be a number"),
    "margin without size": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "'margin' must be a number",
    ),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_bad_pairs_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        stream(row).preflight()
    assert str(caught.value).startswith("rows.jsonl: row 0: ")
    assert "\n" not in str(caught.value)


def test_answers_whose_prompts_are_rendered_differently_are_refused() -> None:
    looks_ahead = (
        "{% for m in messages %}[{{ m['role'] }}{{ messages[-1]['content'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = FAMILIES["ChatML"].tokenizer(looks_ahead)
    with pytest.raises(ValueError, match=r"row 0: chosen: the chat template renders the prompt differently"):
        stream({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, tokenizer).pair(0)


def judged(*rows: dict[str, Any]) -> JudgementStream:
    return JudgementStream(ListRows(rows), BYTES, 0, False, 100)


def test_judgements() -> None:
    good, bad = (judged(*ROWS).judgement(ordinal) for ordinal in range(2))
    assert (parts(good.example), good.good) == (("1+1=", "2<eos>"), True)
    assert (parts(bad.example), bad.good) == ((CONVERSATION[0], "no<|im_end|>"), False)


ROWS = (
    {"prompt": "1+1=", "completion": "2", "label": True},
    {"prompt": [ASKED], "completion": [BAD], "label": False},
)


@pytest.mark.parametrize("label", [1, "true", None, 0.0])
def test_a_label_is_true_or_false(label: Any) -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1: 'label' must be true .*correct the row or remove it"):
        judged(ROWS[0], {**ROWS[1], "label": label}).preflight()


def test_a_completion_of_another_prompt() -> None:
    one, other = (judged(*ROWS).judgement(ordinal).example for ordinal in range(2))
    assert parts(mismatched(one, other, 100)) == ("1+1=", "no<|im_end|>")
    assert parts(mismatched(one, other, 6)) == ("1+1=", "no")


def test_a_completion_of_several_turns_follows_another_prompt_whole() -> None:
    """What the user says in it stays where it is, and is not learned there, either."""
    rows = (ROWS[0], {"prompt": [ASKED], "completion": [BAD, ASKED, GOOD], "label": True})
    one, other = (judged(*rows).judgement(ordinal).example for ordinal in range(2))
    learned = parts(other)[1]
    assert learned == "no<|im_end|>ho<|im_end|>"
    moved = mismatched(one, other, 100)
    assert parts(moved) == ("1+1=", learned)
    assert BYTES.decode(moved.token_ids_T) == "1+1=" + str(BYTES.decode(other.token_ids_T))[len(CONVERSATION[0]) :]


def test_a_pair_is_a_pure_function_of_its_ordinal() -> None:
    rows = ListRows(tuple({"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(20)))
    shuffled = PairStream(rows, BYTES, 7, True, 100)
    order = [answers(shuffled.pair(ordinal))[0] for ordinal in range(20)]
    assert order == [answers(shuffled.pair(ordinal))[0] for ordinal in range(19, -1, -1)][::-1]
    assert sorted(order, key=int) == [str(n) for n in range(20)] != order


@pytest.mark.parametrize(
    ("needed", "line", "message"),
    [
        (("chosen", "rejected"), '{"prompt": "a", "chosen": "b", "reject": "c"}', "no column 'rejected'; did you mean"),
        (("prompt", "completion", "label"), '{"prompt": "a", "completion": "b"}', "no column 'label'"),
    ],
)
def test_a_column_that_is_missing_is_named(tmp_path: Path, needed: tuple[str, ...], line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_rows(DatasetConfig(path=str(path)), needed)


def test_preferences_need_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"chosen": "ab", "rejected": "ac"}\n')
    rows = load_rows(DatasetConfig(path=str(path)), ("chosen", "rejected"))
    assert answers(PairStream(rows, BYTES, 0, False, 100).pair(0)) == ("a", "b<eos>", "c<eos>")
    with pytest.raises(ValueError, match="no column 'prompt' to append it to"):
        load_rows(DatasetConfig(path=str(path), prompt_suffix="?"), ("chosen", "rejected"))
