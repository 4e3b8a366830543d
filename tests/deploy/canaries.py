"""Secrets that are planted in a run's environment must not be found in anything that it leaves, nor in any argument."""

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
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


@contextlib.contextmanager
def watched(canaries: dict[str, str]) -> Iterator[list[str]]:
    """While the context is open, whose arguments hold a canary; all processes that this one has started are looked at.

    The first entry says how many processes were seen.
    """
    found: list[str] = [""]
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for process in psutil.Process(os.getpid()).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = "\0".join(process.cmdline())
                    seen.add(process.pid)
                    found.extend(f"{name}: {process.name()}" for name, value in canaries.items() if value in words)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found[0] = str(len(seen))
