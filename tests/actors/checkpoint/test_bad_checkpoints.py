"""Whatever lies in the place of a checkpoint is passed over for the one before, or told by its file."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from actors.checkpoint.cut import FORMAT, Cut, Progress
from actors.checkpoint.resume import find
from actors.checkpoint.store import CheckpointStore
from actors.policy_state import PolicyState, _check
from actors.recipe.file import dump_recipe, load_recipe
from algorithms.slots import PacerState

DEMO = "recipes/demo.yaml"
PARAMETERS = {"a": torch.ones(3, 2), "b": torch.ones(4)}
DEEP = b"[" * 100_000
PICKLE = pickle.dumps(print)


def state(version: int) -> PolicyState:
    moments = {
        f"{name}.{moment}": value.clone() for name, value in PARAMETERS.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    return PolicyState(version, PARAMETERS, moments, {"0": torch.get_rng_state()}, version, {"last_epoch": version})


def commit(store: CheckpointStore, version: int) -> Path:
    staged = store.stage(version)
    Cut(version, 5, PacerState(version, 100, 40, (), ()), Progress()).write(staged, [])
    state(version).write(staged)
    return store.commit(version)


def reseal(store: CheckpointStore, version: int) -> None:
    """The listing agrees with the files again, as if they had been written so."""
    folder, staged = store.path / f"version-{version:08d}", store.path / f".staged-{version:08d}"
    folder.rename(staged)
    (staged / "COMPLETE.json").unlink()
    store.commit(version)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def relist(folder: Path, change: Callable[[dict], object]) -> None:
    listing = json.loads((folder / "COMPLETE.json").read_bytes())
    change(listing)
    (folder / "COMPLETE.json").write_text(json.dumps(listing))


def rename_listed(name: str) -> Callable[[Path], None]:
    return lambda folder: relist(
        folder, lambda listing: listing["files"].update({name: listing["files"].pop("cut.json")})
    )


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def to_link(folder: Path) -> None:
    (folder / "policy.json").rename(folder.parent / "elsewhere")
    (folder / "policy.json").symlink_to(folder.parent / "elsewhere")


def whole_to_link(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def to_folder(folder: Path) -> None:
    (folder / "COMPLETE.json").unlink()
    (folder / "COMPLETE.json").mkdir()


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def older_copy(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "version-00000010", folder)


def of_another_run(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(commit(CheckpointStore(folder.parents[1] / "other"), 20), folder)


WEIGHTS = "model/model.safetensors"
SPOILED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": (WEIGHTS, edit(WEIGHTS, lambda data: data[:-1])),
    "longer": ("cut.json", edit("cut.json", lambda data: data + b" ")),
    "flipped bit": (
        "optimizer.safetensors",
        edit("optimizer.safetensors", lambda d: d[:-9] + bytes([d[-9] ^ 1]) + d[-8:]),
    ),
    "missing": ("COMPLETE.json lists", lambda folder: (folder / "optimizer.safetensors").unlink()),
    "0 bytes": ("groups.msgpack", edit("groups.msgpack", lambda data: b"")),
    "one more": ("COMPLETE.json lists", lambda folder: (folder / "model" / "more.py").write_bytes(b"")),
    "a link": ("policy.json: a checkpoint holds no links", to_link),
    "all a link": ("version-00000020: a checkpoint is no link", whole_to_link),
    "a file": ("version-00000020/COMPLETE.json", to_file),
    "nothing in it": ("COMPLETE.json", emptied),
    "a version before": ("COMPLETE.json: is of version 10", older_copy),
    "of another run": ("COMPLETE.json: is a checkpoint of another run", of_another_run),
    "no listing": ("COMPLETE.json", lambda folder: (folder / "COMPLETE.json").unlink()),
    "listing is a folder": ("COMPLETE.json", to_folder),
    "listing of 0 bytes": ("COMPLETE.json", edit("COMPLETE.json", lambda data: b"")),
    "listing of another shape": ("COMPLETE.json", edit("COMPLETE.json", lambda data: b'{"version": 20, "files": []}')),
    "listing that is deep": ("COMPLETE.json", edit("COMPLETE.json", lambda data: b'{"x": ' + DEEP)),
    "listing that is no text": ("COMPLETE.json", edit("COMPLETE.json", lambda data: b"\xff\xfe" + data)),
    "listing outside": ("COMPLETE.json lists", rename_listed("../version-00000010/cut.json")),
    "listing from the root": ("COMPLETE.json lists", rename_listed("/etc/hostname")),
}
"""What has become of a checkpoint after it was written, and what is said of it."""

RESEALED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "cut of another shape": ("cut.json", lambda data: b"[1, 2]"),
    "cut that is torn": ("cut.json", lambda data: data[:-3]),
    "cut that is deep": ("cut.json", lambda data: data[:-1] + b', "x": ' + DEEP),
    "cut with another type": ("cut.json", lambda data: data.replace(b'"lines":5', b'"lines":"5"')),
    "cut of another version": ("cut.json", lambda data: data.replace(b'"version":20', b'"version":10')),
    "groups without end": ("groups.msgpack", lambda data: b"\xdd\xff\xff\xff\xff"),
    "groups of another shape": ("groups.msgpack", lambda data: msgspec.msgpack.encode([{"attempt": 1}])),
    "groups that are pickled": ("groups.msgpack", lambda data: PICKLE),
    "measured of 0 bytes": ("measured.msgpack", lambda data: b""),
    "weights that are pickled": (WEIGHTS, lambda data: PICKLE),
    "weights of 0 bytes": (WEIGHTS, lambda data: b""),
    "header without end": (WEIGHTS, lambda data: header(b"{}", 2**60) + data),
    "header longer than the file": (WEIGHTS, lambda data: header(b"{", 90_000_000)),
    "header of another shape": (WEIGHTS, lambda data: header(b"[[1]]")),
    "header that is deep": (WEIGHTS, lambda data: header(DEEP)),
    "tensor behind the end": (
        WEIGHTS,
        lambda data: header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}') + bytes(8),
    ),
    "tensor of other size": (
        WEIGHTS,
        lambda data: header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}') + bytes(8),
    ),
}
"""What was written so, with digests that agree: by a mistake, or on purpose."""


@pytest.fixture
def run(tmp_path: Path) -> tuple[CheckpointStore, Path]:
    store = CheckpointStore(tmp_path / "checkpoints")
    commit(store, 10)
    commit(store, 20)
    dump_recipe(load_recipe(DEMO), tmp_path / "recipe.yaml")
    return store, tmp_path / "recipe.yaml"


def check_passed_over(run: tuple[CheckpointStore, Path], said: str) -> None:
    store, recipe = run
    found = find(store, recipe, load_recipe(DEMO), ())
    assert found is not None
    assert found.cut.version == 10
    (note,) = found.notes
    assert said in note
    assert "\n" not in note
    assert len(note) < 600
    shutil.rmtree(store.path / "version-00000010")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        find(store, recipe, load_recipe(DEMO), ())
    store.discard_after(0)
    assert store.versions() == []


def test_good_ones_are_taken(run: tuple[CheckpointStore, Path]) -> None:
    reseal(run[0], 20)
    found = find(*run, load_recipe(DEMO), ())
    assert found is not None
    assert (found.cut.version, found.notes) == (20, ())
    read = PolicyState.read(found.path)
    _check(PARAMETERS, read)
    assert all(torch.equal(read.weights[name], value) for name, value in PARAMETERS.items())


@pytest.mark.parametrize("kind", SPOILED)
def test_one_that_was_spoiled_is_passed_over(run: tuple[CheckpointStore, Path], kind: str) -> None:
    said, spoil = SPOILED[kind]
    spoil(run[0].path / "version-00000020")
    check_passed_over(run, said)


@pytest.mark.parametrize("kind", RESEALED)
def test_one_that_was_written_badly_is_passed_over(run: tuple[CheckpointStore, Path], kind: str) -> None:
    name, change = RESEALED[kind]
    edit(name, change)(run[0].path / "version-00000020")
    reseal(run[0], 20)
    check_passed_over(run, name)


@pytest.mark.parametrize(("written", "by"), [(FORMAT + 1, "newer"), (FORMAT - 1, "older")])
def test_one_of_another_format_is_told_and_not_passed_over(
    run: tuple[CheckpointStore, Path], written: int, by: str
) -> None:
    """It is good, and to go on from an older one would remove it."""
    change = edit("cut.json", lambda data: b'{"format":%d,"what":"ever"}' % written)
    change(run[0].path / "version-00000020")
    reseal(run[0], 20)
    with pytest.raises(ValueError, match=rf"cut.json: the checkpoint is of format {written}.*the {by} program"):
        find(*run, load_recipe(DEMO), ())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("policy.json", b"{}"),
        ("policy.json", b'{"version": "x"}'),
        ("policy.json", DEEP),
        ("policy.json", None),
        ("random.safetensors", None),
        ("random.safetensors", PICKLE),
        ("optimizer.safetensors", header(b"{}", 2**40)),
        (WEIGHTS, b""),
    ],
)
def test_a_policy_that_cannot_be_read_is_told_by_its_file(
    run: tuple[CheckpointStore, Path], name: str, data: bytes | None
) -> None:
    path = run[0].path / "version-00000020" / name
    path.write_bytes(data) if data is not None else os.unlink(path)
    with pytest.raises(ValueError, match=name):
        PolicyState.read(run[0].path / "version-00000020")


def test_tensors_of_another_model_are_told_before_anything_is_set() -> None:
    good = state(1)
    with pytest.raises(ValueError, match=r"policy is of another model: 1 tensors differ, such as b .*\(4,\) there"):
        _check(PARAMETERS | {"b": torch.ones(5)}, good)
    short = {name: value for name, value in good.moments.items() if name != "a.exp_avg"}
    with pytest.raises(ValueError, match=r"optimizer is of another model: .* such as a.exp_avg \(None there"):
        _check(PARAMETERS, PolicyState(1, good.weights, short, {}, 1, {}))
