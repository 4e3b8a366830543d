"""A full disk ends a run in one sentence, as every other cause does."""

import errno
from pathlib import Path

import pytest
import ray

from actors.errors import RunError
from actors.run.folder import RunFolder
from deploy.train import _told


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    told = _told(OSError(errno.ENOSPC, "No space left on device"), RunFolder(tmp_path))
    assert isinstance(told, RunError)
    assert str(told).startswith(f"run_dir: {tmp_path} cannot be written: No space left on device; make room")
    told = _told(OSError(errno.EROFS, "Read-only file system", "/there/ledger.jsonl"), RunFolder(tmp_path))
    assert "/there/ledger.jsonl cannot be written" in str(told)


def test_a_folder_that_was_taken_away_or_closed_is_named(tmp_path: Path) -> None:
    metrics = str(tmp_path / "metrics.jsonl")
    closed = _told(PermissionError(errno.EACCES, "Permission denied", metrics), RunFolder(tmp_path))
    assert str(closed).startswith(f"run_dir: {metrics} cannot be written: Permission denied; mend that")
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/there/template.jinja")
    assert _told(elsewhere, RunFolder(tmp_path)) is elsewhere, "it is no matter of the run folder"
    stale = _told(OSError(errno.ESTALE, "Stale file handle"), RunFolder(tmp_path))
    assert str(stale).startswith(f"run_dir: {tmp_path} cannot be written: Stale file handle; mend that")
    ours = FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "gone" / "metrics.jsonl"))
    assert _told(ours, RunFolder(tmp_path)) is ours, "the folder is there, so it is an error of ours"
    assert "gone/metrics.jsonl cannot be written" in str(_told(ours, RunFolder(tmp_path / "gone")))


def test_a_lost_object_is_told_in_a_line(tmp_path: Path) -> None:
    told = _told(ray.exceptions.ObjectLostError("ab", "there", "in a step"), RunFolder(tmp_path))
    assert isinstance(told, RunError)
    assert "\n" not in str(told)


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "reset"), KeyError("ours")])
def test_what_is_not_the_disk_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    assert _told(error, RunFolder(tmp_path)) is error
