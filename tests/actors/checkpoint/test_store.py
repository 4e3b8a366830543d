"""A checkpoint is whole, or it is not there, or it is named as damaged; never anything else."""

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint import store as store_module
from actors.checkpoint.config import BestConfig
from actors.checkpoint.store import CheckpointStore, DamagedError
from actors.errors import RunError


def make(store: CheckpointStore, version: int) -> Path:
    staged = store.stage(version)
    (staged / "weights").write_bytes(bytes(range(256)) * version)
    (staged / "inner").mkdir()
    (staged / "inner" / "facts.json").write_text(f'{{"version": {version}}}')
    return store.commit(version)


def raising(error: BaseException) -> Any:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


def test_the_newest_are_kept_and_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.versions() == []
    for version in (5, 10, 15):
        make(store, version)
    assert store.versions() == [10, 15]
    assert (store.open(15) / "inner" / "facts.json").read_text() == '{"version": 15}'
    store.discard_after(10)
    assert store.versions() == [10]


def test_what_was_staged_and_never_committed_is_not_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    make(store, 1)
    (store.stage(2) / "weights").write_bytes(b"half")
    assert store.versions() == [1]
    make(store, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_id", "version-00000001", "version-00000003"]


def test_any_damage_is_found(tmp_path: Path) -> None:
    """Every file cut, lengthened, flipped, removed or added, the list of files included."""
    store = CheckpointStore(tmp_path, keep=1)
    generator = random.Random(0)
    for round_ in range(60):
        store.discard_after(0)
        folder = make(store, 7)
        victim = folder / generator.choice(["weights", "inner/facts.json", "COMPLETE.json"])
        data = victim.read_bytes()
        match round_ % 5:
            case 0:
                victim.write_bytes(data[: generator.randrange(len(data))])
            case 1:
                victim.write_bytes(data + b"}")
            case 2:
                place = generator.randrange(len(data) - 2)
                victim.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            case 3:
                victim.unlink()
            case _:
                (folder / "inner" / "more").write_bytes(b"")
        with pytest.raises(DamagedError, match="version-00000007"):
            store.open(7)


def test_any_byte_of_the_listing_may_be_damaged(tmp_path: Path) -> None:
    """Bytes that are no text, too, wherever they are: msgspec has another error for those."""
    store = CheckpointStore(tmp_path)
    listing = make(store, 7) / "COMPLETE.json"
    data = listing.read_bytes()
    for place in range(len(data) - 1):  # the last is the line's end
        listing.write_bytes(data[:place] + bytes([data[place] | 0x80]) + data[place + 1 :])
        with pytest.raises(DamagedError, match="version-00000007"):
            store.open(7)


def test_links_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = make(store, 1)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(secret)
    with pytest.raises(DamagedError, match="no links"):
        store.open(1)


def test_a_listing_that_leads_outside_is_refused(tmp_path: Path) -> None:
    """With the right size and digest of a file outside, added to the listing or in the place of one of its names."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=9)
    for version, outside in enumerate(["../x", "../../x", str(tmp_path / "x"), "inner/../../x", "./weights"], 1):
        folder = make(store, version)
        (tmp_path / "x").write_bytes((folder / "weights").read_bytes())
        (tmp_path / "checkpoints" / "x").write_bytes((folder / "weights").read_bytes())
        listing = json.loads((folder / "COMPLETE.json").read_text())
        told = listing["files"]["weights"]
        for files in (listing["files"] | {outside: told}, {"inner/facts.json": told, outside: told}):
            (folder / "COMPLETE.json").write_text(json.dumps(listing | {"files": files}))
            with pytest.raises(DamagedError, match="its files are not those"):
                store.open(version)


@pytest.mark.parametrize("place", [".", "inner"])
def test_linked_folders_are_refused(place: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = make(store, 1)
    (folder / place).rename(tmp_path / "elsewhere")
    (folder / place).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(DamagedError, match=r"is no link|holds no links"):
        store.open(1)


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = make(store, 1)
    (folder / "weights").unlink()
    os.mkfifo(folder / "weights")
    with pytest.raises(DamagedError, match="nothing else"):
        store.open(1)


@pytest.mark.parametrize("files", ["null", "[]", "3", '"weights"', '[["weights"]]', '{"weights": null}'])
def test_a_listing_of_another_form_is_refused(files: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = make(store, 1)
    (folder / "COMPLETE.json").write_text(f'{{"version": 1, "files": {files}}}')
    with pytest.raises(DamagedError, match="version-00000001"):
        store.open(1)


def test_one_that_is_being_removed_is_gone_or_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed after it has removed one file of it."""
    store = CheckpointStore(tmp_path, keep=1)
    make(store, 1)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "weights").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("actors.checkpoint.store.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            make(store, 2)
    assert store.versions() == [2]
    store.open(2)
    make(store, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_id", "version-00000003"]


def test_what_cannot_be_removed_or_told_does_not_undo_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint that is on the disk nobody is told that it could not be written; nor is it written once more."""
    store = CheckpointStore(tmp_path, keep=1, best=BestConfig())
    make(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_tell_best", raising(OSError(errno.ENOSPC, "no space left")))
        make(store, 2)
    assert store.versions() == [2]
    store = CheckpointStore(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("actors.checkpoint.store.os.rmdir", raising(OSError(errno.ENOTEMPTY, "somebody reads it")))
        patch.setattr("actors.checkpoint.store.os.unlink", raising(OSError(errno.EBUSY, "somebody reads it")))
        make(store, 3)
        make(store, 4)
        assert store.versions() == [4]
        store.discard_after(3)
        assert store.versions() == [], "else a run that goes back would find what it has given up"
    make(store, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_id", "version-00000005"]


def test_a_write_that_was_given_up_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is still reading the files when the run goes back, and perhaps has come to the same version again."""
    store = CheckpointStore(tmp_path, keep=9)
    make(store, 2)
    for again in (False, True):
        (store.stage(4) / "weights").write_bytes(b"of weights that are gone")
        described = store_module._describe

        def slow(path: Path, again: bool = again, described: Any = described) -> Any:
            found = described(path)
            CheckpointStore(tmp_path, keep=9).discard_after(2)
            if again:
                (CheckpointStore(tmp_path, keep=9).stage(4) / "weights").write_bytes(b"half of the n")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_describe", slow)
            with pytest.raises((RunError, OSError)):
                store.commit(4)
        assert store.versions() == [2]
