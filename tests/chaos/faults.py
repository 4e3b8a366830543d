"""A fault is armed by the harness, and strikes once: in the first process that comes to its point.

A fault is a file `<role>.<point>.<action>.<number>` in `armed/`; whoever renames it into `fired/` is struck.
"""

import ctypes
import json
import os
import signal
import time
from pathlib import Path

FOLDER = "PACELINE_CHAOS"
"""Environment variable: where the faults of a run are; without it nothing strikes."""
STARTED = "started.jsonl"
_LONG_S = 100_000.0


class InjectedError(RuntimeError):
    """Raised because the harness wanted it."""


def strike(role: str, point: str) -> str | None:
    """What is armed for this point happens now; returns an action that the caller must do itself, if any."""
    action = _claim(f"{role}.{point}.")
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise InjectedError(f"injected at {role}.{point}")
        case "full":
            raise OSError(28, "No space left on device (injected)")
        case "hang":
            time.sleep(_LONG_S)
        case "slow":
            time.sleep(1.5)
        case "exit":
            os._exit(3)
        case "segfault":
            ctypes.string_at(0)
    return action


def arm(folder: Path, name: str) -> None:
    (folder / "armed" / name).touch()


def has_fired(folder: Path, name: str) -> bool:
    return (folder / "fired" / name).exists()


def disarm(folder: Path, name: str) -> None:
    """What has not struck will not."""
    (folder / "armed" / name).unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    for name in ("armed", "fired"):
        (folder / name).mkdir(parents=True)


def set_pace(folder: Path, seconds: float) -> None:
    """A light policy takes so long for a step, and longer."""
    (folder / "pace.new").write_text(str(seconds))
    os.replace(folder / "pace.new", folder / "pace")


def keep_pace() -> None:
    folder = os.environ.get(FOLDER)
    if folder is not None and os.path.exists(f"{folder}/pace"):
        time.sleep(float(Path(folder, "pace").read_text()))


def computes(on: bool) -> None:
    """The policy says that it computes, or that it does not."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        mark = Path(folder, "computing")
        mark.touch() if on else mark.unlink(missing_ok=True)


def policy_computes() -> bool:
    """What it has said last; one that was lost in a step has not taken it back, and its successor does."""
    folder = os.environ.get(FOLDER)
    return folder is not None and os.path.exists(f"{folder}/computing")


def reward_of(text: str) -> float:
    """What the reward function gives; never 0, so that a 0 is a failure that was made a number.

    (Here, because a process that scores is started in a tenth of the time when it needs no torch.)
    """
    return 1.0 + sum(text.encode()) % 7


def report(text: str) -> None:
    """Something that must never be was seen; it is on the disk before anything else happens."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        with Path(folder, "findings.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def note_start(replica: int) -> None:
    """That a replica's engine is there now, and which version the journal has come to; None before the first."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    journal = Path(folder).parent / "run" / "ledger.jsonl"
    whole = journal.read_text().rpartition("\n")[0] if journal.exists() else ""
    trained = [line for line in whole.splitlines() if '"trained"' in line]
    version = json.loads(trained[-1])["version"] if trained else None
    with Path(folder, STARTED).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"replica": replica, "version": version}) + "\n")


def _claim(prefix: str) -> str | None:
    folder = os.environ.get(FOLDER)
    if folder is None:
        return None
    for name in sorted(os.listdir(f"{folder}/armed")):
        if name.startswith(prefix):
            try:
                os.rename(f"{folder}/armed/{name}", f"{folder}/fired/{name}")
            except FileNotFoundError:
                continue  # another process was here first
            return name.split(".")[2]
    return None
