"""The same ordinal is the same prompt after any restart, no prompt begins with two BOS, and bad rows are named."""

from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actors.data.dataset import load_rows
from actors.data.prompts import PromptStream, prompt_ids
from actors.model.tiny import byte_tokenizer
from actors.recipe.data import DatasetConfig

BYTES = byte_tokenizer(max_length=256)
TALK = [{"role": "user", "content": "hi"}]
TALK_TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class ListRows:
    """Rows that are written down; `source` is `rows.jsonl`."""

    rows: tuple[dict[str, Any], ...]
    source: str = "rows.jsonl"

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])


def stream(*rows: dict[str, Any], tokenizer: Any = BYTES, **changes: Any) -> PromptStream:
    settings = {"seed": 0, "shuffle": False, "max_prompt_length": 100, **changes}
    return PromptStream(ListRows(rows), tokenizer, **settings)


def bos_tokenizer(chat_template: str | None, eos_too: bool = False) -> PreTrainedTokenizerFast:
    """Llama's manner: `<s>` is put before every string (and, when misconfigured, `</s>` after it)."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(BYTES.get_vocab()), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    ids = {token: tokenizer.token_to_id(token) for token in ("<s>", "</s>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos_too else "<s> $A", special_tokens=list(ids.items())
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = chat_template
    return fast


WRITES_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('roles must be user') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)


def test_strings_and_conversations() -> None:
    found = [stream({"prompt": "abc"}, {"prompt": TALK}).prompt(ordinal) for ordinal in range(2)]
    assert [prompt.token_ids for prompt in found] == [tuple(b"abc"), tuple(BYTES(TALK_TEXT)["input_ids"])]
    assert [prompt.text for prompt in found] == ["abc", TALK]


def test_columns_are_those_that_reward_functions_get() -> None:
    row = {"prompt": "a", "completion": "b", "completion_ids": [1], "answer": "b", "entry": {"k": [1]}}
    assert stream(row).prompt(0).columns == {"answer": "b", "entry": {"k": [1]}}


def test_keys_without_value_are_left_out_of_messages() -> None:
    prompt = stream({"prompt": [{**TALK[0], "name": None}]}).prompt(0)
    assert prompt.text == TALK


def test_one_bos_whatever_adds_it() -> None:
    tokenizer = bos_tokenizer(WRITES_BOS)
    bos = tokenizer.bos_token_id
    for prompt, rest in (("abc", b"abc"), (TALK, b"[user]hi[assistant]")):
        assert prompt_ids(tokenizer, prompt, "") == [bos, *rest]
    # Rendered first and tokenized then, as it is often done, the prompt has two.
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert tokenizer(rendered)["input_ids"][:2] == [bos, bos]


BAD = {
    "BOS in a string": ("<s>abc", bos_tokenizer(None), "row 0: the prompt begins with two BOS tokens '<s>'"),
    "BOS in a conversation": (
        TALK,
        bos_tokenizer("{{ bos_token }}" + WRITES_BOS),
        "row 0: the prompt begins with two BOS tokens '<s>'",
    ),
    "EOS after a string": ("abc", bos_tokenizer(None, eos_too=True), "ends the prompt with EOS '</s>'.*add_eos_token"),
    "no chat template": (TALK, bos_tokenizer(None), "row 0: .*no chat template; use an instruct model"),
    "template refuses": (
        [{"role": "system", "content": "x"}],
        bos_tokenizer(STRICT),
        "row 0: the chat template refuses the conversation .roles must be user., its roles are system",
    ),
    "tool calls that are none": (
        [{"role": "user", "content": "x", "tool_calls": 5}],
        bos_tokenizer("{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}"),
        "row 0: the chat template refuses the conversation .'int' object is not iterable., its roles are user",
    ),
    "empty": ("", BYTES, "row 0: the prompt is empty"),
    "empty conversation": ([], BYTES, "row 0: 'prompt' is an empty conversation"),
    "too long": ("x" * 101, BYTES, "row 0: the prompt has 101 tokens.*allows 100; raise generation.max_prompt_length"),
    "too long conversation": ([{"role": "user", "content": "x" * 90}], BYTES, "row 0: the prompt has 109 tokens"),
    "surrogate": ("\ud800", BYTES, "row 0: the text is not valid Unicode"),
    "surrogate in talk": ([{"role": "user", "content": "\ud800"}], BYTES, "row 0: the text is not valid Unicode"),
    "number": (3, BYTES, "row 0: 'prompt' must be text or a list of messages, it is int"),
    "none": (None, BYTES, "row 0: 'prompt' must be text"),
}


@pytest.mark.parametrize(("prompt", "tokenizer", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(prompt: Any, tokenizer: Any, message: str) -> None:
    bad = stream({"prompt": prompt}, tokenizer=tokenizer)
    for find in (lambda: bad.prompt(0), bad.preflight):
        with pytest.raises(ValueError, match=message) as caught:
            find()
        assert str(caught.value).startswith("rows.jsonl: row 0: ")


def test_a_column_that_is_no_json_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows.jsonl: row 1: the column 'image' cannot be written as JSON"):
        stream({"prompt": "a", "image": "b"}, {"prompt": "a", "image": b"b"}).preflight()


def test_preflight_looks_at_the_first_rows() -> None:
    rows = [{"prompt": "a"}] * 300
    stream(*rows).preflight()
    bad = {"prompt": 3}
    stream(*rows[:256], bad).preflight()
    with pytest.raises(ValueError, match="row 256"):
        stream(*rows[:256], bad).preflight(num_rows=300)
    with pytest.raises(ValueError, match="row 255"):
        stream(*rows[:255], bad).preflight()
    # The rows are the file's first ones, whatever the order of the run.
    with pytest.raises(ValueError, match="row 0"):
        stream(bad, *rows, shuffle=True).preflight(num_rows=1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_prompt_is_a_pure_function_of_its_ordinal(shuffle: bool) -> None:
    config = DatasetConfig(path="reasoning_gym:spell_backward", size=50)

    def started() -> PromptStream:
        return PromptStream(load_rows(config), byte_tokenizer(256), seed=7, shuffle=shuffle, max_prompt_length=100)

    once, again = started(), started()
    ordinals = [*range(120), 3, 77, 3]
    assert [once.prompt(ordinal) for ordinal in ordinals] == [again.prompt(o) for o in reversed(ordinals)][::-1]
    epochs = [{once.prompt(ordinal).text for ordinal in range(e * 50, e * 50 + 50)} for e in range(2)]
    assert epochs[0] == epochs[1] == {load_rows(config).row(index)["prompt"] for index in range(50)}
    assert [once.prompt(ordinal).epoch for ordinal in (0, 49, 50, 119)] == [0, 0, 1, 2]
    assert [once.prompt(ordinal).ordinal for ordinal in (0, 49, 50)] == [0, 49, 50]
    assert (once.prompt(0).text == load_rows(config).row(0)["prompt"]) is not shuffle
