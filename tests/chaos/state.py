"""Batches of a campaign that are done, on the disk: whole lines, of one state of the code alone."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import xxhash

from actors.journal import mend
from tests.chaos.recipe import ROOT
from tests.chaos.result import Result


class State:
    """The first line says which code the results are of; each other line is one batch."""

    def __init__(self, path: Path, code: str) -> None:
        """Go on with the file, or begin it; ValueError when it is of other code."""
        self._path = path
        self._done: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        mend(path)  # of a campaign that was killed while it wrote
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines:
            self._append({"code": code})
            return
        before = lines[0].get("code")
        if before != code:
            raise ValueError(
                f"{path}: its batches ran on the code of {before or 'nobody knows which commit'}, and this is {code}; "
                f"remove it to begin anew, or check that commit out to go on"
            )
        self._done = {line["batch"]: Result.from_dict(line["result"]) for line in lines[1:]}

    def done(self, batch: str) -> Result | None:
        return self._done.get(batch)

    def note(self, batch: str, result: Result) -> None:
        self._done[batch] = result
        self._append({"batch": batch, "result": asdict(result)})

    def _append(self, line: dict[str, object]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def code_id(root: Path = ROOT) -> str:
    """The commit that is checked out, and a digest of what was changed since; `no commit` outside of git."""
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        return "no commit"
    new = _git(root, "ls-files", "--others", "--exclude-standard").decode().splitlines()
    changes = _git(root, "diff", "HEAD") + b"".join((root / name).read_bytes() for name in new)
    return commit.decode().strip() + (f" with changes {xxhash.xxh3_64_hexdigest(changes)}" if changes else "")


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=30.0, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""
