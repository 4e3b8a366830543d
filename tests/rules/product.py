"""The files that run in production; the rules hold for these, and not for tests, benchmarks and recipes."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("actors", "algorithms", "placement", "sync", "deploy")


def sources() -> dict[str, str]:
    """Their texts, by path from the root."""
    files = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
