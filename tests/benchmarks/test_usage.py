"""A benchmark tells what it does when it is asked, and starts nothing."""

import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted(
    path.stem for path in Path("benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize(
    ("name", "argument", "code"), [*((name, "--help", 0) for name in BENCHMARKS), ("demo_seeds", "--no-such-option", 2)]
)
def test_help_and_a_word_that_is_not_known_start_nothing(
    name: str, argument: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, argument])
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)  # else it would be run beside itself
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == code, said.err
    assert f"usage: python -m benchmarks.{name}" in said.out + said.err
