"""Secrets that are planted in a run's environment must not be found in anything that it leaves, nor in any argument.

The processes of the run are looked at while it runs, their listening sockets as well.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NAMES = (
    "WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GITHUB_TOKEN", "RAY_AUTH_TOKEN",
    "DATABASE_PASSWORD",
)  # fmt: skip


def planted() -> dict[str, str]:
    """Each with a value of its own, of a form that all who read it accept."""
    return {name: f"{number:02x}ca9a{secrets.token_hex(17)}" for number, name in enumerate(NAMES)}


def found_in_files(canaries: dict[str, str], *folders: Path) -> list[str]:
    """`name: file` for each canary in each file; a folder must hold something."""
    found = []
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        assert files, f"nothing was left in {folder}"
        for path in files:
            content = path.read_bytes()
            found += [f"{name}: {path}" for name, value in canaries.items() if value.encode() in content]
    return found


@dataclass(slots=True)
class Watched:
    """What was seen of all processes that this one has started."""

    processes: set[int] = field(default_factory=set)
    told: set[str] = field(default_factory=set)
    """`name: process` for each canary in an argument."""
    listening: set[tuple[str, str]] = field(default_factory=set)
    """Process and address of each socket that other machines reach."""

    def look(self, process: psutil.Process, canaries: dict[str, str]) -> None:
        name, words = process.name(), "\0".join(process.cmdline())
        self.processes.add(process.pid)
        self.told |= {f"{canary}: {name}" for canary, value in canaries.items() if value in words}
        for socket in process.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN and not socket.laddr.ip.startswith(("127.", "::1", "::ffff:127.")):
                self.listening.add((name, socket.laddr.ip))


@contextlib.contextmanager
def watched(canaries: dict[str, str]) -> Iterator[Watched]:
    """All processes that this one starts are looked at, again and again, while the context is open."""
    seen = Watched()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            for process in psutil.Process(os.getpid()).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    seen.look(process, canaries)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
