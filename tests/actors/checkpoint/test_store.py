"""A checkpoint is whole, or it is not there, or it is named as damaged; never anything else."""

import random
from pathlib import Path

import pytest

from actors.checkpoint.store import CheckpointStore, DamagedError


def make(store: CheckpointStore, version: int) -> Path:
    staged = store.stage(version)
    (staged / "weights").write_bytes(bytes(range(256)) * version)
    (staged / "inner").mkdir()
    (staged / "inner" / "facts.json").write_text(f'{{"version": {version}}}')
    return store.commit(version)


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


def test_links_are_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = make(store, 1)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(secret)
    with pytest.raises(DamagedError, match="no links"):
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
