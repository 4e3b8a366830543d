"""Good data comes row by row as it is; bad data is a ValueError that names the source, the column and the fix."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from actors.data.dataset import load_rows, prompt_of, reward_columns
from actors.recipe.data import DatasetConfig

TALK = [{"role": "user", "content": "hi"}]


def config(path: str | Path, **changes: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **changes)


def spell(**changes: Any) -> DatasetConfig:
    return config("reasoning_gym:spell_backward", **{"size": 10, **changes})


def write(path: Path, *rows: Any) -> Path:
    """The rows as the file's suffix wants them; a str or bytes is written as it is."""
    if len(rows) == 1 and isinstance(rows[0], (str, bytes)):
        path.write_bytes(rows[0].encode() if isinstance(rows[0], str) else rows[0])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        table = datasets.Dataset.from_list(list(rows))
        {".parquet": table.to_parquet, ".csv": table.to_csv}[path.suffix](str(path))
    return path


ROWS = ({"prompt": "1 + 1 = ", "answer": "2"}, {"prompt": "2 + 2 = ", "answer": "4"})


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    rows = load_rows(config(write(tmp_path / f"data.{suffix}", *ROWS)))
    assert [rows.row(index) for index in range(len(rows))] == list(ROWS)
    assert rows.column_names == ("prompt", "answer")
    assert rows.source == str(tmp_path / f"data.{suffix}")


def test_csv(tmp_path: Path) -> None:
    rows = load_rows(config(write(tmp_path / "data.csv", *ROWS), size=1, prompt_suffix="?"))
    # CSV has no types: what looks like a number is one.
    assert [rows.row(0), len(rows)] == [{"prompt": "1 + 1 = ?", "answer": 2}, 1]


def test_folders_made_by_save_to_disk(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(list(ROWS))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert len(load_rows(config(tmp_path / "one"))) == 2
    assert load_rows(config(tmp_path / "two", split="test")).row(0) == ROWS[1]


def test_conversations_are_given_as_they_are(tmp_path: Path) -> None:
    # Arrow gives each message the keys of all; those without value are left out again.
    longer = [{"role": "user", "content": "hi", "name": "bob"}, {"role": "assistant", "content": "ho"}]
    rows = load_rows(config(write(tmp_path / "data.parquet", {"prompt": TALK}, {"prompt": longer})))
    assert [prompt_of(rows.row(index), "prompt", "") for index in range(2)] == [TALK, longer]


def test_generated_rows() -> None:
    rows = load_rows(spell(task={"min_word_len": 3, "max_word_len": 3}, seed=5, prompt_suffix="\nAnswer: "))
    row = rows.row(7)
    assert len(rows) == 10
    assert set(row) == set(rows.column_names) == {"prompt", "completion", "answer", "entry", "task", "settings"}
    assert row["prompt"] == row["entry"]["question"] + "\nAnswer: "
    assert row["completion"] == row["answer"] == row["entry"]["answer"]
    assert (row["task"], row["settings"]) == ("spell_backward", {"min_word_len": 3, "max_word_len": 3})
    assert json.loads(json.dumps(reward_columns(row, "")))["entry"]["answer"] == row["answer"]


def test_a_generated_row_depends_on_seed_and_number_alone() -> None:
    rows, again, more = load_rows(spell(seed=5)), load_rows(spell(seed=5)), load_rows(spell(seed=5, size=10**9))
    order = [9, 0, 3, 3, 9]
    assert [rows.row(index) for index in order] == [again.row(index) for index in order]
    assert rows.row(3) == again.row(3) == more.row(3)
    assert load_rows(spell(seed=6)).row(3) != rows.row(3)
    # Nothing is generated ahead: a billion rows cost as much as ten.
    assert more.row(999_999_999)["prompt"]


def bad_file(file: str, /, *rows: Any, **changes: Any) -> Callable[[Path], DatasetConfig]:
    return lambda folder: config(write(folder / file, *rows), **changes)


def bad_folder(place: str, /, **changes: Any) -> Callable[[Path], DatasetConfig]:
    def make(folder: Path) -> DatasetConfig:
        table = datasets.Dataset.from_list(list(ROWS))
        table.save_to_disk(str(folder / "one"))
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(folder / "two"))
        (folder / "three").mkdir()
        return config(folder / place, **changes)

    return make


def bad_config(path: str, /, **changes: Any) -> Callable[[Path], DatasetConfig]:
    return lambda folder: config(path, **changes)


SPELL = "reasoning_gym:spell_backward"
DATE = datetime.datetime(2026, 1, 2)

BAD = {
    # Files.
    "missing file": (bad_config("no/such/data.jsonl"), r"dataset.path: there is no file no/such/data.jsonl"),
    "misspelled file": (
        lambda folder: (write(folder / "data.jsonl", *ROWS), config(folder / "dota.jsonl"))[1],
        r"there is no file .*did you mean 'data.jsonl'",
    ),
    "missing absolute path": (bad_config("/no/such/place"), "there is no file /no/such/place"),
    "unknown suffix": (bad_file("data.txt", "hi"), r"ends in '.txt'.*convert it to one of '.jsonl'"),
    "no suffix": (bad_file("data", "hi"), "ends in ''"),
    "no bytes": (bad_file("data.jsonl", ""), "is empty"),
    "no rows": (bad_file("data.json", "[]"), "is empty"),
    "no csv rows": (bad_file("data.csv", "prompt,answer\n"), "is empty"),
    "broken line": (bad_file("data.jsonl", '{"prompt": "a"}\n{"prompt":\n'), "cannot be read as jsonl .*: JSON parse"),
    "numbers for rows": (bad_file("data.jsonl", "1\n2\n"), "cannot be read as jsonl"),
    "column twice": (bad_file("data.jsonl", '{"prompt":"a","prompt":"b"}\n'), r"specified twice"),
    "surrogate": (bad_file("data.jsonl", '{"prompt":"\\ud800"}\n'), "surrogate"),
    "broken csv": (bad_file("data.csv", 'prompt\n"x\n'), "cannot be read as csv"),
    "broken parquet": (bad_file("data.parquet", "PAR?"), "cannot be read as parquet"),
    # Folders, splits, sizes.
    "strange folder": (bad_folder("three"), "was not made by save_to_disk"),
    "unknown split": (bad_folder("two", split="tset"), "no split 'tset'; did you mean 'test'.*'train', 'test'"),
    "split of one": (bad_folder("one", split="test"), "without splits"),
    "split of a file": (bad_file("a.jsonl", *ROWS, split="test"), "no split 'test' in a single file"),
    "bad slice": (bad_file("a.jsonl", *ROWS, split="train[:x]"), "train.:x."),
    "too large": (bad_file("a.jsonl", *ROWS, size=3), "dataset.size: 3 rows of .*it has 2"),
    "name of a file": (bad_file("a.jsonl", *ROWS, name="main"), "dataset.name: .*remove dataset.name"),
    "revision of a file": (bad_file("a.jsonl", *ROWS, revision="v1"), "dataset.revision: .*remove"),
    "task of a file": (bad_file("a.jsonl", *ROWS, task={"n": 1}), "dataset.task: .*remove dataset.task"),
    # Columns.
    "no prompt": (
        bad_file("a.jsonl", {"Promt": "a", "answer": "b"}),
        "no column 'prompt'; did you mean 'Promt'.*its columns are 'Promt', 'answer'",
    ),
    "question": (bad_file("a.jsonl", {"question": "a"}), "no column 'prompt'; its columns are 'question'; rename"),
    "completions": (bad_file("a.jsonl", {"prompt": "a", "completions": "b"}), "the column 'completions' bears"),
    "prompts": (bad_file("a.jsonl", {"prompt": "a", "prompts": "b"}), "the column 'prompts' bears"),
    "completion_ids": (bad_file("a.jsonl", {"prompt": "a", "completion_ids": [1]}), "column 'completion_ids' bears"),
    "bytes": (bad_file("a.parquet", {"prompt": "a", "image": b"x"}), "row 0: the column 'image' cannot be written"),
    "date": (bad_file("a.parquet", {"prompt": "a", "day": DATE}), "'day' cannot be written as JSON"),
    "date in JSON": (bad_file("a.jsonl", {"prompt": "a", "day": "2026-01-02"}), "'day' cannot be .*ISO dates"),
    # Prompts.
    "number": (bad_file("a.jsonl", {"prompt": 3}), "row 0: 'prompt' must be text or a list of messages, it is int"),
    "null": (bad_file("a.jsonl", {"prompt": None}), "it is NoneType"),
    "dict": (bad_file("a.jsonl", {"prompt": {"role": "user", "content": "a"}}), "it is dict"),
    "no messages": (bad_file("a.jsonl", {"prompt": []}), "'prompt' is an empty conversation"),
    "strings": (bad_file("a.jsonl", {"prompt": ["a"]}), "'prompt' must hold messages like"),
    "no role": (bad_file("a.jsonl", {"prompt": [{"content": "a"}]}), "must hold messages like"),
    "no content": (bad_file("a.jsonl", {"prompt": [{"role": "user"}]}), "must hold messages like"),
    "parts": (
        bad_file("a.jsonl", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        "with text as content",
    ),
    "suffix of talk": (bad_file("a.jsonl", {"prompt": TALK}, prompt_suffix="!"), "dataset.prompt_suffix: .*remove"),
    # Generated tasks.
    "unknown task": (
        bad_config("reasoning_gym:spell_backwards", size=3),
        "no task 'spell_backwards'; did you mean 'spell_backward'",
    ),
    "no task": (bad_config("reasoning_gym:", size=3), "no task ''"),
    "no size": (bad_config(SPELL), "dataset.size: .*say how many"),
    "unknown setting": (
        bad_config(SPELL, size=3, task={"min_word_length": 3}),
        "no setting 'min_word_length'; did you mean 'min_word_len'.*'data_file', 'max_word_len', 'min_word_len'",
    ),
    "impossible": (bad_config(SPELL, size=3, task={"min_word_len": 9, "max_word_len": 3}), "max_word_len must be >="),
    "wrong type": (bad_config(SPELL, size=3, task={"min_word_len": "three"}), "dataset.task: .*cannot use"),
    "no such words": (bad_config(SPELL, size=3, task={"min_word_len": 90, "max_word_len": 99}), "cannot use"),
    "no word file": (bad_config(SPELL, size=3, task={"data_file": "none.txt"}), "cannot use.*none.txt"),
    "seed in task": (bad_config(SPELL, size=3, task={"seed": 3}), "dataset.task.seed: set dataset.seed instead"),
    "size in task": (bad_config(SPELL, size=3, task={"size": 3}), "dataset.task.size: set dataset.size instead"),
    "split of a task": (bad_config(SPELL, size=3, split="test"), "dataset.split: .*remove"),
    "name of a task": (bad_config(SPELL, size=3, name="main"), "dataset.name: .*remove"),
    "tuples": (bad_config("reasoning_gym:arc_agi", size=3), "do not survive JSON"),
    "composite": (bad_config("reasoning_gym:composite", size=3), "Must specify at least one dataset"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_named(tmp_path: Path, make: Callable[[Path], DatasetConfig], message: str) -> None:
    bad = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(bad)
    text = str(caught.value)
    assert text.startswith("dataset.") or bad.path in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no-such/dataset", "'no-such/dataset' is neither a file or folder here nor a data set that the hub gives"),
        ("reasoning-gym:gcd", "a generated task reads 'reasoning_gym:<task>'"),
    ],
)
def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, path: str, message: str) -> None:
    # Offline, so that the test does not wait for a network.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        load_rows(config(path))


def test_settings_reach_the_generator() -> None:
    rows = load_rows(spell(task={"min_word_len": 4, "max_word_len": 4}))
    assert {len(rows.row(index)["answer"]) for index in range(10)} == {4}
