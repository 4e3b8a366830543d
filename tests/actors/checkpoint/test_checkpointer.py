"""A cut that cannot be written is told and does not end the run; the last one must be."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint.checkpointer import Checkpointer
from actors.checkpoint.cut import Progress
from actors.checkpoint.store import CheckpointStore
from actors.errors import RunError
from actors.ledger import Ledger
from actors.pacer import AsyncPacer
from algorithms.pacing import Pacer


class StandIn:
    """A policy whose files are one; `write` may fail."""

    def __init__(self) -> None:
        self.write: Callable[[Path], object] = lambda folder: (folder / "weights").write_bytes(b"w")
        self.num_snapshots = 0
        self.healthy = True

    async def snapshot(self) -> None:
        self.num_snapshots += 1

    async def write_snapshot(self, folder: Path, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.write(folder)


def make(folder: Path, every: int = 2) -> tuple[Checkpointer, StandIn, list[str]]:
    policy: Any = StandIn()
    said: list[str] = []
    pacer = AsyncPacer(Pacer(groups_per_batch=2, max_staleness=1, num_batches=9), stall_timeout_s=5.0)
    checkpointer = Checkpointer(
        store=CheckpointStore(folder / "checkpoints"),
        every=every,
        timeout_s=5.0,
        pacer=pacer,
        policy=policy,
        ledger=Ledger(folder / "ledger.jsonl"),
        progress=Progress,
        say=said.append,
        healthy=lambda: policy.healthy,
    )
    return checkpointer, policy, said


async def test_cuts_are_taken_when_due(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    for version in range(1, 6):
        await checkpointer.after(version)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [2, 4]
    assert (policy.num_snapshots, said) == (2, [])


async def test_a_cut_that_is_due_waits_until_all_is_well(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path, every=3)
    for version in range(1, 8):
        policy.healthy = version not in (3, 4)
        await checkpointer.after(version)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [5, 6]


async def test_one_that_fails_is_told_and_the_next_is_written(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    good, policy.write = policy.write, lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    await checkpointer.after(2)
    await checkpointer.finish()
    assert checkpointer.store.versions() == []
    assert "the checkpoint of version 2 could not be written" in said[0]
    assert "No space left" in said[0]
    policy.write = good
    await checkpointer.after(4)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [4]


async def test_the_last_one_is_on_the_disk_or_it_is_an_error(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path)
    await checkpointer.last(3)
    assert checkpointer.store.versions() == [3]
    policy.write = lambda folder: (_ for _ in ()).throw(OSError("broken"))
    with pytest.raises(RunError, match="version 5 could not be written: broken"):
        await checkpointer.last(5)


async def test_a_version_is_cut_once(tmp_path: Path) -> None:
    """A signal right after a cut: what is being written is waited for, not written again."""
    checkpointer, policy, _ = make(tmp_path)
    await checkpointer.after(2)
    await checkpointer.last(2)
    assert policy.num_snapshots == 1
    assert checkpointer.store.versions() == [2]
