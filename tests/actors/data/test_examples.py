"""An example is its prompt and its completion, and the loss is on what the model must say, its end included."""

from typing import Any

import numpy as np
import pytest

from actors.data.dataset import load_rows
from actors.data.examples import ExampleStream
from actors.model.tiny import byte_tokenizer
from actors.recipe.data import DatasetConfig
from algorithms.types import Rollout
from tests.actors.data.test_prompts import TALK, TALK_TEXT, WRITES_BOS, ListRows, bos_tokenizer

BYTES = byte_tokenizer(max_length=256)
ANSWER = [{"role": "assistant", "content": "ho"}]


def stream(prompt: Any, completion: Any, tokenizer: Any = BYTES, max_length: int = 100) -> ExampleStream:
    return ExampleStream(ListRows(({"prompt": prompt, "completion": completion},)), tokenizer, 0, False, max_length)


def learned(example: Rollout) -> list[int]:
    return example.token_ids_T[example.loss_mask_T].tolist()


def given(example: Rollout) -> list[int]:
    return example.token_ids_T[: int(np.argmax(example.loss_mask_T))].tolist()


def test_strings() -> None:
    example = stream("ab", "cd").example(0)
    assert example.token_ids_T.tolist() == [*b"abcd", BYTES.eos_token_id]
    assert example.loss_mask_T.tolist() == [False, False, True, True, True]
    assert (example.token_ids_T.dtype, example.loss_mask_T.dtype) == (np.int32, np.bool_)
    assert not example.logprobs_T.any()
    assert (example.logprobs_T.dtype, example.spans, example.finish_reason) == (np.float32, (), "stop")


def test_conversations() -> None:
    """The tiny model's EOS is another token than the one that closes its turns, at which generation stops, too."""
    example = stream(TALK, ANSWER).example(0)
    assert given(example) == BYTES(TALK_TEXT)["input_ids"]
    assert learned(example) == BYTES("ho<|im_end|>")["input_ids"]
    assert BYTES.decode(example.token_ids_T) == TALK_TEXT + "ho<|im_end|>\n", "as it is rendered"


def test_conversation_of_several_turns() -> None:
    more = [*ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "hum"}]
    example = stream(TALK, more).example(0)
    assert given(example) == BYTES(TALK_TEXT)["input_ids"]
    assert learned(example) == BYTES("ho<|im_end|>hum<|im_end|>")["input_ids"]
    text = "ho<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nhum<|im_end|>\n"
    assert BYTES.decode(example.token_ids_T) == TALK_TEXT + text


def test_what_the_user_says_at_the_end_of_a_completion_is_not_learned() -> None:
    example = stream(TALK, [*ANSWER, {"role": "user", "content": "and?"}]).example(0)
    assert learned(example) == BYTES("ho<|im_end|>")["input_ids"]


@pytest.mark.parametrize(("completion", "text"), [("c<eos>", "c<eos>"), ("<eos>c", "<eos>c<eos>"), ("", "<eos>")])
def test_eos_is_there_once(completion: str, text: str) -> None:
    assert learned(stream("ab", completion).example(0)) == BYTES(text)["input_ids"]


def test_eos_that_the_template_writes_is_not_repeated() -> None:
    tokenizer = byte_tokenizer(256)
    tokenizer.eos_token = "<|im_end|>"
    assert learned(stream(TALK, ANSWER, tokenizer).example(0)) == BYTES("ho<|im_end|>")["input_ids"]


def test_eos_closes_a_turn_that_the_template_does_not() -> None:
    tokenizer = bos_tokenizer(WRITES_BOS)
    talk = [*TALK, *ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "hum"}]
    text, eos = "[user]hi[assistant]ho[user]and?[assistant]hum", tokenizer.eos_token_id
    for row in ({"messages": talk}, {"prompt": talk[:1], "completion": talk[1:]}):
        example = ExampleStream(ListRows((row,)), tokenizer, 0, False, 100, assistant_only_loss=True).example(0)
        assert example.token_ids_T.tolist() == [tokenizer.bos_token_id, *text.encode(), eos]
        assert learned(example) == [*b"hohum", eos]


def test_one_bos_at_the_start() -> None:
    tokenizer = bos_tokenizer(WRITES_BOS)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert stream("ab", "cd", tokenizer).example(0).token_ids_T.tolist() == [bos, *b"abcd", eos]
    talk = stream(TALK, ANSWER, tokenizer).example(0)
    assert talk.token_ids_T.tolist() == [bos, *b"[user]hi[assistant]ho", eos]
    assert learned(talk) == [*b"ho", eos]


# Shows the date only when the assistant has not spoken yet, so the prompt is no prefix of the whole.
CHANGES = "{% if add_generation_prompt %}now: {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"

BAD = {
    "no prefix": (TALK, ANSWER, bos_tokenizer(CHANGES), "renders the prompt differently when the completion follows"),
    "text and messages": ("ab", ANSWER, BYTES, "must both be text or both be messages"),
    "messages and text": (TALK, "ho", BYTES, "must both be text or both be messages"),
    "no completion": ("ab", None, BYTES, "'completion' must be text or a list of messages, it is NoneType"),
    "number": ("ab", 3, BYTES, "'completion' must be text or a list of messages, it is int"),
    "no assistant": (TALK, [{"role": "user", "content": "and?"}], BYTES, "renders the prompt differently"),
    "no messages": (TALK, [], BYTES, "'completion' is an empty conversation"),
    "no content": (TALK, [{"role": "assistant"}], BYTES, "'completion' must hold messages"),
    "empty prompt": ("", "a", BYTES, "the prompt is empty"),
    "too long": ("a" * 50, "b" * 50, BYTES, "prompt and completion have 101 tokens, max_length allows 100; raise"),
    "surrogate": ("a", "\udc80", BYTES, "not valid Unicode"),
}


@pytest.mark.parametrize(("prompt", "completion", "tokenizer", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(prompt: Any, completion: Any, tokenizer: Any, message: str) -> None:
    bad = stream(prompt, completion, tokenizer)
    for find in (lambda: bad.example(0), bad.preflight):
        with pytest.raises(ValueError, match=message) as caught:
            find()
        assert str(caught.value).startswith("rows.jsonl: row 0: ")


def test_data_without_completions_is_refused() -> None:
    rows = ListRows(({"prompt": "a", "answer": "b"},))
    with pytest.raises(ValueError, match=r"rows.jsonl has no column 'completion'.*its columns are prompt, answer"):
        ExampleStream(rows, BYTES, 0, False, 100)


def test_an_example_is_a_pure_function_of_its_ordinal() -> None:
    config = DatasetConfig(path="reasoning_gym:spell_backward", size=20)

    def started(seed: int) -> ExampleStream:
        return ExampleStream(load_rows(config), BYTES, seed, True, 96)

    def texts(examples: ExampleStream, ordinals: Any) -> list[str]:
        return [BYTES.decode(examples.example(ordinal).token_ids_T.tolist()) for ordinal in ordinals]

    assert texts(started(1), range(45)) == texts(started(1), reversed(range(45)))[::-1]
    assert texts(started(1), range(20)) != texts(started(2), range(20))
    assert sorted(texts(started(1), range(20))) == sorted(texts(started(1), range(20, 40)))
    example = started(1).example(0)
    row = next(row for row in map(load_rows(config).row, range(20)) if BYTES.decode(given(example)) == row["prompt"])
    assert BYTES.decode(learned(example)) == row["answer"] + "<eos>"
