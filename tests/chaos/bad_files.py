"""Data sets and checkpoints that are wrong by construction.

A file of rows has at least one row of which no prompt can be made. Of a run's only checkpoint, one thing is spoiled.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from transformers import PreTrainedTokenizerBase

from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.groups import SavedGroup
from actors.checkpoint.resume import find
from actors.checkpoint.store import CheckpointStore
from actors.data.dataset import RESERVED, load_rows
from actors.data.prompts import PromptStream
from actors.model.tiny import byte_tokenizer
from actors.recipe.data import DatasetConfig
from actors.recipe.file import dump_recipe, load_recipe
from algorithms.slots import PacerState
from algorithms.types import Group, Prompt, ScoredGroup, summarize
from tests.chaos.rollouts import rollout_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "demo.yaml"

Made = tuple[str, Callable[[], object], tuple[str, ...], str]
"""What it is, what must refuse it, which words that must say, and what tells it from others."""


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer(256)


def bad_rows(rng: random.Random, folder: Path) -> Made:
    """One file, among whose good rows is a bad one, or which is no file of rows at all."""
    name = f"rows-{rng.getrandbits(60):x}"
    good = [{"prompt": f"say {rng.randrange(1000)}", "answer": "a"} for _ in range(rng.randrange(1, 4))]
    talk = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": "a"} for row in good]
    bad_of_text: list[Any] = [None, "", "   " * 0, "x" * 99, "\ud800"]
    bad_of_talk: list[Any] = [
        [], [{"role": "user"}], [{"content": "a"}], [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "x" * 99}], [{"role": "user", "content": None}],
        [{"role": "user", "content": "\udfff"}],
    ]  # fmt: skip
    forms: dict[str, tuple[str, bytes]] = {
        "bad text": (".jsonl", _lines([*good, {"prompt": rng.choice(bad_of_text), "answer": "a"}])),
        "bad talk": (".jsonl", _lines([*talk, {"prompt": rng.choice(bad_of_talk), "answer": "a"}])),
        "numbers": (".jsonl", _lines([{"prompt": rng.choice([1, 2.5, True]), "answer": "a"}])),
        "no prompt column": (".jsonl", _lines([{"question": "a"}])),
        "reserved column": (
            ".jsonl",
            _lines([good[0] | {rng.choice(RESERVED): 1}]),
        ),
        "mixed types": (".jsonl", _lines([*good, {"prompt": {"a": 1}}, *good])),
        "open line": (".jsonl", _lines(good) + b'{"prompt": "a'),
        "no mapping": (".jsonl", b"[1, 2]\n3\n"),
        "words": (".jsonl", b"once upon a time\n"),
        "bytes": (".jsonl", bytes(rng.randrange(128, 256) for _ in range(40))),
        "empty": (rng.choice([".jsonl", ".json", ".csv", ".parquet"]), b""),
        "no columns": (".csv", b"\n\n"),
        "csv without prompt": (".csv", b"question,answer\na,b\n"),
        "no parquet": (".parquet", bytes(rng.randrange(256) for _ in range(60))),
        "half a parquet": (".parquet", b"PAR1" + bytes(20)),
        "unknown suffix": (rng.choice([".txt", ".jsnl", ".yaml", ""]), _lines(good)),
    }
    form = rng.choice(sorted(forms))
    suffix, data = forms[form]
    path = folder / (name + suffix)
    path.write_bytes(data)

    def intake() -> object:
        config = DatasetConfig(path=str(path))
        try:
            PromptStream(load_rows(config), _tokenizer(), 0, True, 64).preflight()
        finally:
            path.unlink(missing_ok=True)
        return None

    return f"rows: {form}", intake, (name,), digest(suffix.encode(), data)


def digest(*parts: bytes) -> str:
    """Equal inputs alone have equal ones."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# Checkpoints ---------------------------------------------------------------------------------------------------------


@cache
def _whole(folder: Path) -> Path:
    """The run folder of a run that has left one checkpoint, with a group that waits in it."""
    run = folder / "whole"
    store = CheckpointStore(run / "checkpoints")
    staged = store.stage(10)
    prompt = Prompt(40, 0, (1, 2), "ab", {"answer": "a"})
    scored = ScoredGroup(Group(prompt, (rollout_of(prompt),) * 2, 0, 0), (1.0, 2.0), {"f": (1.0, 2.0)})
    saved = SavedGroup(0, 9, False, summarize(scored, 1.0, 1.0), scored)
    Cut(10, 5, PacerState(10, 100, 41, (), ()), Progress()).write(staged, [saved])
    (staged / "policy.json").write_text('{"version": 10}')
    store.commit(10)
    dump_recipe(load_recipe(RECIPE), run / "recipe.yaml")
    assert find(store, run / "recipe.yaml", load_recipe(RECIPE), ()) is not None
    return run


def bad_checkpoint(rng: random.Random, folder: Path) -> Made:
    run = folder / f"run-{rng.getrandbits(60):x}"
    shutil.copytree(_whole(folder), run)
    version = run / "checkpoints" / "version-00000010"
    form = rng.choice(sorted(SPOILERS))
    SPOILERS[form](rng, version)
    files = [path for path in sorted(version.rglob("*")) if path.is_file()]
    parts = [part for path in files for part in (path.name.encode(), b"@" * path.is_symlink(), path.read_bytes())]

    def intake() -> object:
        try:
            return find(CheckpointStore(run / "checkpoints"), run / "recipe.yaml", load_recipe(RECIPE), ())
        finally:
            shutil.rmtree(run)

    return f"checkpoint: {form}", intake, (str(run),), digest(*parts)


def _truncated(rng: random.Random, version: Path) -> None:
    path = _any_file(rng, version)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _flipped(rng: random.Random, version: Path) -> None:
    path = _any_file(rng, version, but="COMPLETE.json")
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _gone(rng: random.Random, version: Path) -> None:
    _any_file(rng, version).unlink()


def _extra(rng: random.Random, version: Path) -> None:
    (version / f"extra-{rng.randrange(100)}.bin").write_bytes(b"more")


def _linked(rng: random.Random, version: Path) -> None:
    path = _any_file(rng, version, but="COMPLETE.json")
    elsewhere = version.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _unlisted(rng: random.Random, version: Path) -> None:
    """The listing is no listing."""
    texts = [
        "",
        "{",
        "[]",
        "7",
        "null",
        '{"files": 3}',
        '{"version": 10}',
        '{"files": {"../../recipe.yaml": {}}}',
        "\x00",
    ]
    (version / "COMPLETE.json").write_text(rng.choice(texts))


def _forged(rng: random.Random, version: Path) -> None:
    """The digests are right, and the content is none of ours."""
    name = rng.choice(["cut.json", "groups.msgpack"])
    contents = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'{"version": "ten"}',
        b"\x80\x04\x95",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\xc1" * 9,
    ]
    if name == "groups.msgpack":
        contents = [data for data in contents if data != b"[]"]
        contents += [msgspec.msgpack.encode(value) for value in ({}, [1], [{"attempt": 1}], "x", [None])]
        contents += [_with_one_value_spoiled(rng, version / name)]
    (version / name).write_bytes(rng.choice(contents))
    _relist(version)


def _with_one_value_spoiled(rng: random.Random, path: Path) -> bytes:
    """A group whose arrays have other lengths than one another."""
    groups = msgspec.msgpack.decode(path.read_bytes())
    rollout = groups[0]["scored"]["group"]["rollouts"][0]
    array = rng.choice(["token_ids_T", "loss_mask_T", "logprobs_T"])
    rollout[array] = rollout[array][: -rng.randrange(1, len(rollout[array]))]
    return msgspec.msgpack.encode(groups)


def _relist(version: Path) -> None:
    """Write the listing as the store does."""
    (version / "COMPLETE.json").unlink()
    staged = version.parent / ".staged-00000010"
    version.rename(staged)
    CheckpointStore(version.parent).commit(10)


SPOILERS: dict[str, Callable[[random.Random, Path], None]] = {
    "truncated": _truncated,
    "bit flipped": _flipped,
    "file gone": _gone,
    "file too many": _extra,
    "a link": _linked,
    "no listing": _unlisted,
    "forged": _forged,
}


def _any_file(rng: random.Random, version: Path, but: str = "") -> Path:
    return rng.choice(sorted(path for path in version.iterdir() if path.name != but))
