"""What the harness reads in the folder of a run, and what it does to it."""

import contextlib
import json
import random
import shutil
from pathlib import Path

from actors.checkpoint.store import CheckpointStore

_LONGEST_LINE = 2**16
"""Bytes that one line of metrics has at most."""


def last_metric(path: Path, name: str) -> float | None:
    """Of the last step in a file of metrics."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
        lines = file.read().rpartition(b"\n")[0].rsplit(b"\n", 1)
    return json.loads(lines[-1]).get(name) if lines[-1] else None


def checkpoints_of(run: Path) -> list[float]:
    """When each of the committed checkpoints was written, oldest version first (time.time())."""
    written = []
    for version in CheckpointStore(run / "checkpoints").versions():
        with contextlib.suppress(FileNotFoundError):  # it makes room for a newer one
            written.append((run / "checkpoints" / f"version-{version:08d}").stat().st_mtime)
    return written


def tear(ledger: Path, rng: random.Random) -> None:
    """The journal ends at a random byte of a line, as when the machine stops while it is written."""
    lines = ledger.read_bytes().splitlines(keepends=True)
    half = rng.choice(lines)
    with ledger.open("ab") as file:
        file.write(half[: rng.randrange(1, len(half))].rstrip(b"\n"))


def damage(checkpoints: Path, how: str, rng: random.Random) -> bool:
    """The newest of at least two checkpoints is not what was written."""
    versions = sorted(path for path in checkpoints.glob("version-*") if path.is_dir())
    if len(versions) < 2:
        return False
    victim = rng.choice(sorted(path for path in versions[-1].rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(victim.read_bytes())
    if how == "truncate":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return True


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
