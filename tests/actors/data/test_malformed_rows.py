"""A bad row behind good ones is refused when the file is read or when the row is met, in one line that names it."""

import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.data.dataset import TaskRows, load_rows
from actors.data.prompts import PromptStream
from actors.model.tiny import byte_tokenizer
from actors.recipe.data import DatasetConfig

BYTES = byte_tokenizer(max_length=256)
TALK = [{"role": "user", "content": "hi"}]

Make = Callable[[Path], Path]


def jsonl(*rows: Any, good: Any = "good") -> Make:
    """A file of one good prompt, and then these rows, as JSON or as the text of a line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in ({"prompt": good}, *rows)]

    def make(folder: Path) -> Path:
        path = folder / "rows.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
        return path

    return make


def raw(name: str, data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def parquet(**columns: list[Any]) -> Make:
    def make(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "rows.parquet")
        return folder / "rows.parquet"

    return make


def talk(*messages: Any) -> Make:
    return jsonl({"prompt": list(messages)}, good=TALK)


def stream(path: Path) -> PromptStream:
    return PromptStream(load_rows(DatasetConfig(path=str(path))), BYTES, 0, shuffle=False, max_prompt_length=100)


def read_all(path: Path) -> None:
    found = stream(path)
    for ordinal in range(len(found.rows)):
        found.prompt(ordinal)


def message(role: Any = "user", content: Any = "hi", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


MALFORMED: dict[str, tuple[Make, str]] = {
    # Prompts that are strings.
    "empty": (jsonl({"prompt": ""}), "row 1: the prompt is empty"),
    "spaces": (jsonl({"prompt": "  \t "}), "row 1: the prompt is empty"),
    "line ends": (jsonl({"prompt": "\n\r\n"}), "row 1: the prompt is empty"),
    "wide spaces": (jsonl({"prompt": "\u3000\u2003\u00a0"}), "row 1: the prompt is empty"),
    "null": (jsonl({"prompt": None}), "row 1: 'prompt' must be text"),
    "missing": (jsonl({"answer": "a"}), "row 1: 'prompt' must be text"),
    "an empty row": (jsonl({}), "row 1: 'prompt' must be text"),
    "one token too long": (jsonl({"prompt": "x" * 101}), "row 1: the prompt has 101 tokens"),
    "a megabyte": (jsonl({"prompt": "x" * 2**20}), "row 1: the prompt has 1048576 tokens"),
    "many tokens of few letters": (jsonl({"prompt": "\U0001f600" * 30}), "row 1: the prompt has 120 tokens"),
    "a lone surrogate": (jsonl('{"prompt": "\\ud800"}'), "surrogate"),
    "a number among strings": (jsonl({"prompt": 3}), "row 1: 'prompt' must be text"),
    "a dict among strings": (jsonl({"prompt": {"text": "a"}}), "row 1: 'prompt' must be text"),
    "a boolean among strings": (jsonl({"prompt": True}), "row 1: 'prompt' must be text"),
    # Lines and files.
    "a torn line": (jsonl('{"prompt": "a'), "cannot be read as jsonl"),
    "a bare string": (jsonl('"a"'), "cannot be read as jsonl"),
    "an array for a row": (jsonl('["a"]'), "cannot be read as jsonl"),
    "two rows in a line": (jsonl('{"prompt": "a"} {"prompt": "b"'), "cannot be read as jsonl"),
    "single quotes": (jsonl("{'prompt': 'a'}"), "cannot be read as jsonl"),
    "bytes that are no UTF-8": (
        raw("rows.jsonl", b'{"prompt": "good"}\n{"prompt": "\xff\xfe"}\n'),
        "row 1 cannot be read",
    ),
    "UTF-16": (raw("rows.jsonl", '{"prompt": "good"}\n'.encode("utf-16")), "cannot be read as jsonl"),
    "gzip under a false name": (raw("rows.jsonl", b"\x1f\x8b\x08\x00\x00\x00\x00\x00"), "cannot be read as jsonl"),
    "zeros": (raw("rows.jsonl", bytes(100)), "cannot be read as jsonl"),
    "a JSON object for a table": (raw("rows.json", b'{"prompt": "a"'), "cannot be read as json"),
    "parquet cut short": (raw("rows.parquet", b"PAR1" + bytes(50)), "cannot be read as parquet"),
    "CSV with a row too long": (raw("rows.csv", b"prompt,answer\na,b\na,b,c,d\n"), "cannot be read as csv"),
    "CSV with an empty prompt": (raw("rows.csv", b"prompt,answer\ngood,b\n,b\n"), "row 1: 'prompt' must be text"),
    "CSV of numbers": (raw("rows.csv", b"prompt\n1\n2\n"), "row 0: 'prompt' must be text"),
    "CSV of Latin-1": (raw("rows.csv", "prompt\ngood\nd\u00e9\n".encode("latin-1")), "cannot be read as csv"),
    # Conversations.
    "an empty conversation": (talk(), "row 1: 'prompt' is an empty conversation"),
    "a message without role": (talk({"content": "hi"}), "row 1: 'prompt' must hold messages"),
    "a message without content": (talk({"role": "user"}), "row 1: 'prompt' must hold messages"),
    "content of a number": (talk(message(content=3)), "row 1: 'prompt' must hold messages"),
    "content of parts": (talk(message(content=[{"type": "text", "text": "hi"}])), "row 1: 'prompt' must hold messages"),
    "a null message": (talk(None), "row 1: 'prompt' must hold messages"),
    "a string for a message": (talk("hi"), "row 1: 'prompt' must hold messages"),
    "an assistant at the end": (talk(message(), message("assistant")), "row 1: the prompt ends with the assistant's"),
    "nothing said": (talk(message(content=" ")), "row 1: the prompt is empty"),
    "a conversation too long": (talk(*[message()] * 30), "row 1: the prompt has .* tokens"),
    # Columns.
    "bytes": (parquet(prompt=["good", "a"], image=[None, b"x"]), "row 1: the column 'image' cannot be written"),
    "a date": (parquet(prompt=["good", "a"], day=[None, datetime.date(2026, 1, 2)]), "row 1: the column 'day'"),
    "a duration": (parquet(prompt=["good", "a"], t=[None, datetime.timedelta(1)]), "row 1: the column 't'"),
    "prompts of bytes": (parquet(prompt=[b"good", b"a"]), "row 0: 'prompt' must be text"),
}


@pytest.mark.parametrize(("make", "expected"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_refused_in_one_line(tmp_path: Path, make: Make, expected: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=expected) as caught:
        read_all(path)
    text = str(caught.value)
    assert path.name in text
    assert "\n" not in text
    assert type(caught.value) is ValueError, "what a library raised is said in our words"
    assert len(text) < 600


SOUND: dict[str, tuple[Make, Any]] = {
    "a NUL": (jsonl({"prompt": "a\0b"}), "a\0b"),
    "right to left": (jsonl({"prompt": "\u202e\u05d0\u05d1"}), "\u202e\u05d0\u05d1"),
    "a byte order mark": (jsonl({"prompt": "\ufeffa"}), "\ufeffa"),
    "the longest": (jsonl({"prompt": "x" * 100}), "x" * 100),
    "a combining mark": (jsonl({"prompt": "e\u0301"}), "e\u0301"),
    "a repeated row": (jsonl({"prompt": "good"}), "good"),
    "surrogates that are a pair": (jsonl('{"prompt": "\\ud83d\\ude00"}'), "\U0001f600"),
    "a column that only some rows have": (jsonl({"prompt": "a", "answer": "b"}), "a"),
    "a blank line between": (jsonl("", {"prompt": "a"}), "a"),
    "spaces around": (jsonl({"prompt": " a "}), " a "),
}


@pytest.mark.parametrize(("make", "expected"), SOUND.values(), ids=SOUND)
def test_odd_but_sound_rows_are_taken_as_they_are(tmp_path: Path, make: Make, expected: Any) -> None:
    prompt = stream(make(tmp_path)).prompt(1)
    assert prompt.text == expected
    assert bytes(prompt.token_ids) == expected.encode()


def test_a_number_that_is_none_reaches_the_reward_as_it_is(tmp_path: Path) -> None:
    path = parquet(prompt=["good"], score=[math.nan])(tmp_path)
    score = stream(path).prompt(0).columns["score"]
    assert score is None or math.isnan(score)


@pytest.mark.parametrize(
    "error", [AssertionError(), IndexError("no word"), ZeroDivisionError("by 0"), RuntimeError("no")]
)
def test_a_generator_that_fails_on_a_row_names_it(error: Exception) -> None:
    class Items:
        def __getitem__(self, index: int) -> Any:
            raise error

    rows = TaskRows("reasoning_gym:words", "words", {}, Items(), 9, "")
    with pytest.raises(ValueError, match=r"reasoning_gym:words: row 3 cannot be generated .*; change dataset.task"):
        rows.row(3)


def test_strings_and_conversations_may_be_mixed(tmp_path: Path) -> None:
    assert stream(jsonl({"prompt": TALK})(tmp_path)).prompt(1).text == TALK


@pytest.mark.parametrize("num_bad", [0, 1, 2, 3])
def test_the_first_rows_may_be_bad_within_the_budget(tmp_path: Path, num_bad: int) -> None:
    found = stream(jsonl(*[{"prompt": ""}] * num_bad, *[{"prompt": "a"}] * 3)(tmp_path))
    if num_bad <= 2:
        found.preflight(max_bad_rows=2)
    else:
        with pytest.raises(ValueError, match=r"row 3: the prompt is empty.*; dataset.max_bad_rows allows 2 such rows"):
            found.preflight(max_bad_rows=2)


def test_not_every_row_may_be_bad(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset.max_bad_rows: 2 would let every row of .*rows.jsonl be bad"):
        stream(jsonl({"prompt": "a"})(tmp_path)).preflight(max_bad_rows=2)
