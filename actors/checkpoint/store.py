"""A checkpoint is whole or it is not there: it is staged, every file is digested and synced, and a rename commits it.

checkpoints/version-00000040/    committed: COMPLETE.json lists every file with its size and digest
checkpoints/.staged-00000050/    on its way, or left behind by a process that was killed
checkpoints/best.json            which is the best, when the recipe asks; made anew after every commit
checkpoints/run_id               of the run whose checkpoints these are
"""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from actors.checkpoint.best import best_of, score_of
from actors.checkpoint.config import BestConfig
from actors.errors import RunError

_COMPLETE = "COMPLETE.json"
_COMMITTED = re.compile(r"version-(\d{8,18})")
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A committed checkpoint is not what was written: the message names the file."""


class _File(msgspec.Struct, frozen=True):
    bytes: int
    xxh3_128: str
    """Finds damage at the disk's speed, not forgery."""


class _Listing(msgspec.Struct, frozen=True):
    version: int
    run: str
    files: dict[str, _File]


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one run; the newest `keep` are left, and the `best`."""

    path: Path
    keep: int = 2
    best: BestConfig | None = None

    def stage(self, version: int) -> Path:
        """An empty folder for the files of a checkpoint."""
        self._clear()
        folder = self.path / f".staged-{version:08d}"
        folder.mkdir(parents=True)
        return folder

    def commit(self, version: int) -> Path:
        """What was staged is a checkpoint when this returns, whatever happens to the machine then."""
        staged = self.path / f".staged-{version:08d}"
        held = os.open(staged, os.O_RDONLY)  # while it is open, no other folder can have its number
        try:
            return self._commit(version, staged, os.fstat(held).st_ino)
        finally:
            os.close(held)

    def _commit(self, version: int, staged: Path, number: int) -> Path:
        files = {name: _describe(staged / name) for name in _files(staged)}
        listing = _Listing(version, self._run_id() or self._name_run(), files)
        (staged / _COMPLETE).write_bytes(msgspec.json.format(msgspec.json.encode(listing), indent=1) + b"\n")
        for folder, _, names in os.walk(staged):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        committed = self._folder(version)
        if committed.exists() or staged.stat().st_ino != number:
            raise RunError(f"{staged}: the run has gone back meanwhile, and this checkpoint is given up")
        staged.rename(committed)
        _sync(self.path)
        with contextlib.suppress(OSError):  # it is written, whatever keeps older ones; the next commit tries again
            self._prune()
        return committed

    def left_over(self) -> list[Path]:
        """What should be gone, and could not be removed."""
        too_many = [
            self._folder(version) for version in self.versions()[: -self.keep] if version != self.best_version()
        ]
        return [*too_many, *self.path.glob(".staged-gone-*")]

    def versions(self) -> list[int]:
        """Of the committed checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        found = (_COMMITTED.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)

    def open(self, version: int) -> Path:
        """The folder of a checkpoint, every file as it was written; DamagedError names the first that is not."""
        folder = self._folder(version)
        if folder.is_symlink():
            raise DamagedError(f"{folder}: a checkpoint is no link")
        try:
            listing = msgspec.json.decode((folder / _COMPLETE).read_bytes(), type=_Listing)
        except (OSError, ValueError, RecursionError) as error:  # of msgspec, or of bytes that are no text
            raise DamagedError(f"{folder / _COMPLETE}: {error}") from error
        if listing.version != version:
            raise DamagedError(f"{folder / _COMPLETE}: is of version {listing.version}")
        if listing.run != (self._run_id() or listing.run):
            raise DamagedError(f"{folder / _COMPLETE}: is a checkpoint of another run")
        if sorted(listing.files) != sorted(name for name in _files(folder) if name != _COMPLETE):
            raise DamagedError(f"{folder}: its files are not those that {_COMPLETE} lists")
        for name, expected in listing.files.items():
            try:
                found = _describe(folder / name)
            except OSError as error:
                raise DamagedError(f"{folder / name}: {error}") from error
            if found != expected:
                raise DamagedError(f"{folder / name}: not what was written (size or digest differs)")
        return folder

    def discard_after(self, version: int) -> None:
        """The run goes back to `version`; what came later belongs to a history that is given up.

        So does what is being written: whoever still writes it finds nothing to commit.
        """
        self._clear()
        for later in self.versions():
            if later > version:
                _remove(self._folder(later))
        if self.best is not None:
            self._tell_best()

    def best_version(self) -> int | None:
        """The committed checkpoint with the best value; None when the recipe does not ask, or none has a value."""
        if self.best is None:
            return None
        return best_of({version: score_of(self._folder(version)) for version in self.versions()}, self.best)

    def _clear(self) -> None:
        """Nothing is staged; a thread that was given up may still write to what it had opened."""
        for left_behind in self.path.glob(".staged-*"):
            doomed = self.path / f".staged-gone-{uuid.uuid4().hex}"
            left_behind.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _folder(self, version: int) -> Path:
        return self.path / f"version-{version:08d}"

    def _prune(self) -> None:
        """After the commit: whenever the process is killed, at most too many are left, and the next commit prunes."""
        best = self.best_version()
        try:
            self._tell_best()
        except OSError:
            with contextlib.suppress(OSError):  # none is better than one that names what is removed now
                (self.path / "best.json").unlink(missing_ok=True)
        for version in self.versions()[: -self.keep]:
            if version != best:
                _remove(self._folder(version))

    def _tell_best(self) -> None:
        path, version = self.path / "best.json", self.best_version()
        score = None if version is None else score_of(self._folder(version))
        if self.best is None or score is None:
            path.unlink(missing_ok=True)
            return
        told = {"version": version, "metric": score.metric, "mode": self.best.mode, "value": score.value}
        staged = self.path / "best.json.staged"
        staged.write_bytes(msgspec.json.encode(told) + b"\n")
        staged.rename(path)

    def _run_id(self) -> str | None:
        """None where nobody has left one: folders that were copied by hand are taken as they are."""
        path = self.path / "run_id"
        return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else None

    def _name_run(self) -> str:
        (self.path / "run_id").write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
        _sync(self.path / "run_id")
        name = self._run_id()
        assert name is not None
        return name


def _files(folder: Path) -> Iterator[str]:
    """Relative names of all files, none outside the folder; links are not followed, and none is written."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise DamagedError(f"{path}: a checkpoint holds no links")
        if path.is_file():
            yield path.relative_to(folder).as_posix()
        elif not path.is_dir():  # a pipe, say, would keep its reader waiting
            raise DamagedError(f"{path}: a checkpoint holds files and folders, nothing else")


def _describe(path: Path) -> _File:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return _File(path.stat().st_size, digest.hexdigest())


def _remove(path: Path) -> None:
    """Whole or not at all: when the process is killed meanwhile, or a file cannot be removed, as NFS has it where
    somebody reads it, what is left is no checkpoint and is cleared later."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)  # of a link the link alone
        return
    doomed = path.with_name(f".staged-gone-{uuid.uuid4().hex}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
