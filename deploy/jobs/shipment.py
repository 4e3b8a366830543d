"""What is sent is this folder without environments, runs, caches and secrets: small, and the same bytes each time.

`.gitignore` and `.rayignore` are heeded as Ray heeds them. The archive of equal files is equal to the byte, so the
cluster knows what it has already.
"""

import fnmatch
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT_MB = 200
"""A project is text. Data and models belong on storage that all nodes see."""
FOLDERS = (
    ".git", ".hg", ".svn", ".venv*", "venv", "__pycache__", ".*_cache", ".hypothesis", ".tox", ".ipynb_checkpoints",
    "node_modules", "wandb", ".ssh", ".aws", ".ray", ".idea", ".vscode",
)  # fmt: skip
"""Folders that are left out wherever they are."""
FILES = ("*.pyc", ".env", ".env.*", ".netrc", "*.pem", "id_rsa*", "id_ed25519*", "auth_token", ".DS_Store")
"""Files that are left out wherever they are."""
RUNS = "runs"
"""Where runs leave everything when their recipes do not say; left out at the top."""
EXCLUDES = (*FOLDERS, *FILES, f"/{RUNS}")
"""The same for Ray, which packs the folder itself where a cluster is joined: patterns as in a `.gitignore`."""

_QUIET = logging.getLogger("paceline.shipment")
_MB = 10**6
_MOST_NAMED = 5
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that an archive can hold


@dataclass(frozen=True)
class Shipment:
    """Files below a folder, by their paths from there, with their sizes in bytes; in order."""

    root: Path
    sizes: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    def has(self, path: str) -> bool:
        """Whether a file, or something below a folder, is sent; the path is from the root."""
        name = os.path.normpath(path)
        return name == "." or name in self.sizes or any(each.startswith(f"{name}/") for each in self.sizes)

    def write(self, archive: Path) -> None:
        """The archive as Ray unpacks it."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for name in self.sizes:
                entry = zipfile.ZipInfo(name, _DATE)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = ((self.root / name).stat().st_mode & 0xFFFF) << 16
                file.writestr(entry, (self.root / name).read_bytes())


def pack(root: Path) -> Shipment:
    """What of a folder is sent; ValueError names the largest folders when it is too much."""
    sizes = {name: (root / name).stat().st_size for name in sorted(_walk(root, root, []))}
    shipment = Shipment(root, sizes)
    if not sizes:
        raise ValueError(f"{root}: there is nothing to send; give the command in the project's folder")
    if shipment.num_bytes > LIMIT_MB * _MB:
        raise ValueError(
            f"{root}: {_size(shipment.num_bytes)} would be sent, and {LIMIT_MB} MB are the most: {_largest(sizes)}; "
            "move data and models to storage that all nodes see, or name what the run does not need in .rayignore"
        )
    return shipment


def _walk(root: Path, folder: Path, ignored: list[Callable[[Path], bool]]) -> Iterator[str]:
    """Names of the files below a folder. A link to a folder is not followed: it leads out, or in a circle."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    ignored = [*ignored, *get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_QUIET)]
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        path = Path(entry.path)
        if any(match(path) for match in ignored):
            continue
        if entry.is_dir(follow_symlinks=False):
            if not (_among(entry.name, FOLDERS) or (folder == root and entry.name == RUNS)):
                yield from _walk(root, path, ignored)
        elif entry.is_file() and not _among(entry.name, (*FILES, *FOLDERS)):
            yield path.relative_to(root).as_posix()


def _among(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _largest(sizes: dict[str, int]) -> str:
    """The heaviest folders and files at the top."""
    heavy: Counter[str] = Counter()
    for name, size in sizes.items():
        top, slash, _ = name.partition("/")
        heavy[f"{top}{slash}"] += size
    return ", ".join(f"{name} {_size(size)}" for name, size in heavy.most_common(_MOST_NAMED))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 10**9:.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / _MB:.1f} MB"
