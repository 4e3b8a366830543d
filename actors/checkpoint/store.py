"""A checkpoint is whole or it is not there: it is staged, every file is digested and synced, and a rename commits it.

checkpoints/version-00000040/    committed: COMPLETE.json lists every file with its size and digest
checkpoints/.staged-00000050/    on its way, or left behind by a process that was killed
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

_COMPLETE = "COMPLETE.json"
_COMMITTED = re.compile(r"version-(\d{8,})")
_CHUNK = 1 << 20


class DamagedError(ValueError):
    """A committed checkpoint is not what was written: the message names the file."""


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one run; `keep` are left, the newest."""

    path: Path
    keep: int = 2

    def stage(self, version: int) -> Path:
        """An empty folder for the files of a checkpoint."""
        for left_behind in self.path.glob(".staged-*"):
            shutil.rmtree(left_behind)
        folder = self.path / f".staged-{version:08d}"
        folder.mkdir(parents=True)
        return folder

    def commit(self, version: int) -> Path:
        """What was staged is a checkpoint when this returns, whatever happens to the machine then."""
        staged = self.path / f".staged-{version:08d}"
        files = {name: _describe(staged / name) for name in _files(staged)}
        listing = staged / _COMPLETE
        listing.write_text(json.dumps({"version": version, "files": files}, indent=1) + "\n", encoding="utf-8")
        for folder, _, names in os.walk(staged):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        committed = self._folder(version)
        assert not committed.exists(), f"version {version} is cut once; going back discards what came later"
        staged.rename(committed)
        _sync(self.path)
        self._prune()
        return committed

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
            listing = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
            files: dict[str, dict[str, object]] = dict(listing["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{folder / _COMPLETE}: {error}") from error
        if sorted(files) != sorted(name for name in _files(folder) if name != _COMPLETE):
            raise DamagedError(f"{folder}: its files are not those that {_COMPLETE} lists")
        for name, expected in files.items():
            if _describe(folder / name) != expected:
                raise DamagedError(f"{folder / name}: not what was written (size or digest differs)")
        return folder

    def discard_after(self, version: int) -> None:
        """The run goes back to `version`; what came later belongs to a history that is given up."""
        for later in self.versions():
            if later > version:
                shutil.rmtree(self._folder(later))

    def _folder(self, version: int) -> Path:
        return self.path / f"version-{version:08d}"

    def _prune(self) -> None:
        for version in self.versions()[: -self.keep]:
            shutil.rmtree(self._folder(version))


def _files(folder: Path) -> Iterator[str]:
    """Relative names of all files, none outside the folder; links are not followed, and none is written."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise DamagedError(f"{path}: a checkpoint holds no links")
        if path.is_file():
            yield path.relative_to(folder).as_posix()
        elif not path.is_dir():  # a pipe, say, would keep its reader waiting
            raise DamagedError(f"{path}: a checkpoint holds files and folders, nothing else")


def _describe(path: Path) -> dict[str, object]:
    digest = xxhash.xxh3_128()  # finds damage at the disk's speed, not forgery
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
