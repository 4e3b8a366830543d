"""A benchmark tells what it does when it is asked, and starts nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(
    path.stem for path in Path("benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize(
    ("name", "argument", "code"), [*((name, "--help", 0) for name in BENCHMARKS), ("demo_seeds", "--no-such-option", 2)]
)
def test_help_and_a_word_that_is_not_known_start_nothing(name: str, argument: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", argument], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    said = done.stdout + done.stderr
    assert f"usage: python -m benchmarks.{name}" in said
    assert "Traceback" not in said
