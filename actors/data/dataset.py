"""Rows by number: `row(i)` depends on the recipe and i alone, and bad data is a ValueError that names source and fix.

Column types are TRL's: prompt-only (`prompt`), prompt-completion (`prompt`, `completion`), conversations (`messages`),
preferences (`chosen`, `rejected`, and `prompt` unless both begin with it) and judgements (`prompt`, `completion`,
`label`), standard (strings) or conversational (lists of messages). All other columns go to the reward functions, as
JSON.
"""

import dataclasses
import difflib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
from datasets.exceptions import DatasetsError

from actors.recipe.data import DatasetConfig
from algorithms.types import Messages

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
TASK_PREFIX = "reasoning_gym:"
RESERVED = ("prompts", "completions", "completion_ids")
"""Keywords that every reward function is called with; a column of such a name would collide."""

# What a third-party task generator raises on settings it cannot use.
TASK_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Rows(Protocol):
    """Rows of one data set; `row(i)` is a pure function of i, `source` names the data set in messages."""

    @property
    def source(self) -> str: ...

    @property
    def column_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TableRows:
    """Rows of a Hugging Face data set, as they are; the suffix is appended to prompts that are strings."""

    source: str
    table: datasets.Dataset
    prompt_suffix: str

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int) -> dict[str, Any]:
        assert 0 <= index < len(self), f"{self.source}: row {index} of {len(self)}"
        try:
            row = dict(self.table[index])
        except (OSError, ValueError) as error:  # such as text that is not UTF-8, which is found when it is read
            raise ValueError(
                f"{self.source}: row {index} cannot be read ({_reason(error)}); correct the row or remove it"
            ) from error
        if isinstance(row.get("prompt"), str):
            row["prompt"] += self.prompt_suffix
        return row


@dataclass(frozen=True)
class TaskRows:
    """Rows that a reasoning-gym task generates one by one: row i is a pure function of the seed and i."""

    source: str
    task: str
    settings: Mapping[str, Any]
    items: Any
    size: int
    prompt_suffix: str

    @property
    def column_names(self) -> tuple[str, ...]:
        return "prompt", "completion", "answer", "entry", "task", "settings"

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> dict[str, Any]:
        assert 0 <= index < self.size, f"{self.source}: row {index} of {self.size}"
        try:
            entry = self.items[index]
        except TASK_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{self.source}: row {index} cannot be generated ({reason}); change dataset.task or dataset.seed"
            ) from error
        return {
            "prompt": entry["question"] + self.prompt_suffix,
            "completion": entry["answer"],
            "answer": entry["answer"],
            "entry": entry,
            "task": self.task,
            "settings": dict(self.settings),
        }


def load_rows(config: DatasetConfig, needed: Sequence[str] = ("prompt",)) -> Rows:
    """The rows that the recipe names, with the columns that are needed; prompts are checked as far as the first row
    tells.

    ValueError names the key, file or hub name, the column and the fix.
    """
    rows: Rows
    if config.path.startswith(TASK_PREFIX):
        rows = _task_rows(config)
    else:
        _refuse(config.task, config, "task", f"only '{TASK_PREFIX}<task>' has settings; remove dataset.task")
        rows = _table_rows(config)
    for name in needed:
        if name not in rows.column_names:
            talks = name == "prompt" and "messages" in rows.column_names
            hint = "; recipes of kind 'sft' learn whole conversations with assistant_only_loss: true" if talks else ""
            raise ValueError(
                f"dataset.path: {rows.source} has no column '{name}'{_did_you_mean(name, rows.column_names)}; its "
                f"columns are {_listed(rows.column_names)}; rename the one that holds the {name} to '{name}'{hint}"
            )
    if "prompt" not in needed:
        _refuse(
            config.prompt_suffix and "prompt" not in rows.column_names,
            config,
            "prompt_suffix",
            "it has no column 'prompt' to append it to; remove prompt_suffix",
        )
        return rows
    for name in RESERVED:
        if name in rows.column_names:
            raise ValueError(
                f"dataset.path: {rows.source}: the column '{name}' bears the name of a keyword that every reward "
                "function is called with; rename the column"
            )
    first = rows.row(0)
    if isinstance(prompt_of(first, "prompt", f"{rows.source}: row 0"), list):
        _refuse(config.prompt_suffix, config, "prompt_suffix", "its prompts are conversations; remove prompt_suffix")
    reward_columns(first, f"{rows.source}: row 0")
    return rows


def prompt_of(row: Mapping[str, Any], column: str, where: str) -> str | Messages:
    """The text or the conversation in `row[column]`; ValueError when it is neither. Keys without value are left out."""
    value = row[column]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: '{column}' must be text or a list of messages, it is {type(value).__name__} "
            f"({str(value)[:60]}); correct the row or remove it"
        )
    if not value:
        raise ValueError(f"{where}: '{column}' is an empty conversation; correct the row or remove it")
    messages: Messages = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{where}: '{column}' must hold messages like {{'role': 'user', 'content': '...'}} with text as "
                f"content, it holds {str(message)[:80]}; correct the row or remove it"
            )
        # Arrow gives every message the keys of all messages.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def reward_column_names(column_names: Iterable[str]) -> list[str]:
    """The columns that reward functions get: all but those that become prompts and completions (TRL's rule)."""
    return [name for name in column_names if name not in ("prompt", "completion", "completion_ids")]


def reward_columns(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What reward functions get of a row; ValueError when a column cannot travel as JSON."""
    columns = {name: row[name] for name in reward_column_names(row)}
    for name, value in columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: the column '{name}' cannot be written as JSON ({error}), and reward functions run in "
                "another process; remove the column or store it as text (in *.json files ISO dates are read as "
                "timestamps: save such data as *.parquet with a text column)"
            ) from error
    return columns


def _task_rows(config: DatasetConfig) -> TaskRows:
    """The generated rows of a reasoning-gym task; its first row and its scorer have been tried."""
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"dataset.path: '{config.path}' needs the package reasoning-gym; run 'pip install reasoning-gym'"
        ) from error
    task = config.path.removeprefix(TASK_PREFIX)
    if task not in DATASETS:
        raise ValueError(
            f"dataset.path: reasoning-gym has no task '{task}'{_did_you_mean(task, DATASETS)}; its {len(DATASETS)} "
            f"tasks are {_listed(sorted(DATASETS))}"
        )
    if config.size is None:
        raise ValueError(f"dataset.size: {config.path} generates rows without end; say how many to use, such as 10000")
    _refuse(config.name, config, "name", "a generated task has no configurations; remove dataset.name")
    _refuse(config.revision, config, "revision", "a generated task has no revisions; remove dataset.revision")
    _refuse(config.split != "train", config, "split", "a generated task has no splits; remove dataset.split")
    dataset_type, config_type = DATASETS[task]
    _check_settings(config, {field.name for field in dataclasses.fields(config_type)})
    try:
        items = dataset_type(config=config_type(**config.task, seed=config.seed, size=config.size))
        entry = items[0]
    except TASK_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"dataset.task: {config.path} cannot use {dict(config.task)}: {reason}") from error
    _check_score(config.path, items, entry)
    return TaskRows(config.path, task, config.task, items, config.size, config.prompt_suffix)


def _check_settings(config: DatasetConfig, known: set[str]) -> None:
    """Every setting is one that the task has, and `seed` and `size` are given in their one place."""
    for name in ("seed", "size"):
        if name in config.task:
            raise ValueError(f"dataset.task.{name}: set dataset.{name} instead")
    valid = sorted(known - {"seed", "size"})
    unknown = [name for name in config.task if name not in known]
    if unknown:
        raise ValueError(
            f"dataset.task: {config.path} has no setting {_listed(unknown)}{_did_you_mean(unknown[0], valid)}; "
            f"its settings are {_listed(valid)}"
        )


def _check_score(source: str, items: Any, entry: Mapping[str, Any]) -> None:
    """An entry scores the same after a journey as JSON; tasks that compare tuples would give wrong rewards."""
    try:
        traveled = json.loads(json.dumps(entry))
        same = items.score_answer(entry["answer"], traveled) == items.score_answer(entry["answer"], entry)
    except TASK_ERRORS:
        same = False
    if not same:
        raise ValueError(
            f"dataset.path: the entries of {source} do not survive JSON, in which they travel to reward functions, so "
            "its scores would be wrong; choose another task"
        )


def _table_rows(config: DatasetConfig) -> TableRows:
    """The rows of a file, of a folder that `save_to_disk` made, or of the hub."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        table = _read_folder(config, path)
    elif path.suffix in READERS and path.is_file():
        table = _read_file(config, path)
    elif path.is_file():
        raise ValueError(
            f"dataset.path: {config.path} ends in '{path.suffix}', which is not a data file; convert it to one of "
            f"{_listed(READERS)}"
        )
    elif path.suffix in READERS or config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(
            f"dataset.path: there is no file {config.path}{_did_you_mean(path.name, siblings)} (working directory: "
            f"{Path.cwd()}); correct dataset.path"
        )
    else:
        table = _read_hub(config)
    if len(table) == 0:
        raise ValueError(f"dataset.path: {config.path} is empty; a run needs at least one row")
    if config.size is not None and config.size > len(table):
        raise ValueError(
            f"dataset.size: {config.size} rows of {config.path} were asked for, it has {len(table)}; lower "
            "dataset.size, or leave it out to use them all"
        )
    return TableRows(config.path, table.select(range(config.size or len(table))), config.prompt_suffix)


def _read_file(config: DatasetConfig, path: Path) -> datasets.Dataset:
    _refuse_hub_keys(config)
    _refuse(
        config.split.partition("[")[0] != "train",
        config,
        "split",
        f"there is no split '{config.split}' in a single file; leave dataset.split out, or name another file",
    )
    if path.stat().st_size == 0:
        raise ValueError(f"dataset.path: {config.path} is empty; a run needs at least one row")
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs tracebacks of what is raised, and said, below
    try:
        return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split=config.split)
    except (OSError, EOFError, ValueError, DatasetsError) as error:
        # `[]` has no rows for any split, which `datasets` says in its own words.
        if "corresponds to no data" in str(error):
            raise ValueError(f"dataset.path: {config.path} is empty; a run needs at least one row") from error
        raise ValueError(
            f"dataset.path: {config.path} cannot be read as {path.suffix[1:]} (split '{config.split}'): "
            f"{_reason(error)}; correct the file, or dataset.split"
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(verbosity)


def _read_folder(config: DatasetConfig, path: Path) -> datasets.Dataset:
    _refuse_hub_keys(config)
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"dataset.path: the folder {config.path} was not made by save_to_disk of `datasets` ({_reason(error)}); "
            "name a file in it, or save the data set with save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise ValueError(
                f"dataset.split: {config.path} has no split '{config.split}'{_did_you_mean(config.split, loaded)}; "
                f"its splits are {_listed(loaded)}"
            )
        return loaded[config.split]
    _refuse(config.split != "train", config, "split", "the folder holds one data set without splits; remove it")
    return loaded


def _read_hub(config: DatasetConfig) -> datasets.Dataset:
    hint = f"; a generated task reads '{TASK_PREFIX}<task>'" if ":" in config.path else ""
    try:
        return datasets.load_dataset(config.path, config.name, split=config.split, revision=config.revision)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        if str(error).startswith("Unknown split"):
            raise ValueError(f"dataset.split: {config.path}: {_reason(error)}") from error
        raise ValueError(
            f"dataset.path: '{config.path}' is neither a file or folder here nor a data set that the hub gives "
            f"({_reason(error)}); check dataset.path, dataset.name and dataset.revision, the network and "
            f"HF_HUB_OFFLINE, or log in with HF_TOKEN when the data set is gated{hint}"
        ) from error


def _refuse_hub_keys(config: DatasetConfig) -> None:
    _refuse(config.name, config, "name", "only data sets of the hub have configurations; remove dataset.name")
    _refuse(config.revision, config, "revision", "only data sets of the hub have revisions; remove dataset.revision")


def _refuse(given: object, config: DatasetConfig, key: str, why: str) -> None:
    """A setting that would have no effect is an error, never ignored."""
    if given:
        raise ValueError(f"dataset.{key}: {config.path}: {why}")


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
