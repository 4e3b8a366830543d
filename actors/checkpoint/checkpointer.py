"""Cuts are taken while a run goes on: training stands still while the policy is copied to the host, and no longer.

The copy is written in the background. A cut that cannot be written is told and does not end the run.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ray.exceptions import RayError

from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.groups import SavedGroup
from actors.checkpoint.store import CheckpointStore
from actors.deadline import within
from actors.errors import RunError
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.policy_group import PolicyGroup

_FETCH_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Checkpointer:
    """`after` every step."""

    store: CheckpointStore
    every: int
    timeout_s: float
    pacer: AsyncPacer
    policy: PolicyGroup
    ledger: Ledger
    progress: Callable[[], Progress]
    say: Callable[[str], None]
    cut_version: int | None = None
    """Of the last cut; that from which the run goes on."""
    stall_s: float = 0.0
    """Training has stood still for cuts so long, in all."""
    _writing: asyncio.Task[None] | None = None

    async def after(self, version: int) -> None:
        """A cut, if one is due and the run goes on."""
        if self.every and version % self.every == 0 and not self.pacer.exhausted:
            await self.cut(version)

    async def last(self, version: int) -> None:
        """The run stops here: a cut, on the disk when this returns; RunError when it could not be written."""
        if version != self.cut_version:
            await self.cut(version)
        await self._written()

    async def cut(self, version: int) -> None:
        """Take one; the one before must have been written."""
        started = time.monotonic()
        await self.finish()
        self.cut_version = version
        # Of one moment: nothing is awaited between these.
        state, ready = self.pacer.state()
        cut = Cut(version, self.ledger.num_lines, state, self.progress())
        self.ledger.flush()
        await self.policy.snapshot()
        self._writing = asyncio.create_task(self._write(cut, ready), name="checkpoint")
        self.stall_s += time.monotonic() - started

    async def finish(self, timeout_s: float | None = None) -> None:
        """What is being written is on the disk when this returns, or it was told why not."""
        try:
            await self._written(timeout_s)
        except RunError as error:
            self.say(f"warning: {error}; the run goes on without it")

    async def _written(self, timeout_s: float | None = None) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            await within(timeout_s or self.timeout_s, writing, "writing it")
        except (OSError, RunError, RayError, ValueError, TypeError, OverflowError, NotImplementedError) as error:
            # Of Ray, the disk, or a column of the data set that is no JSON: none of them is worth the run.
            raise RunError(f"the checkpoint of version {self.cut_version} could not be written: {error}") from error

    async def _write(self, cut: Cut, ready: list[ReadyGroup]) -> None:
        groups = [await _saved(group) for group in ready]
        folder = await asyncio.to_thread(self._stage, cut, groups)
        await self.policy.write_snapshot(folder, self.timeout_s)
        await asyncio.to_thread(self.store.commit, cut.version)

    def _stage(self, cut: Cut, groups: list[SavedGroup]) -> Path:
        folder = self.store.stage(cut.version)
        cut.write(folder, groups)
        return folder


async def _saved(group: ReadyGroup) -> SavedGroup:
    slot = group.slot
    scored = await within(_FETCH_TIMEOUT_S, group.scored, f"fetching group {slot.ordinal} for a checkpoint")
    return SavedGroup(slot.attempt, slot.version, slot.resumed, group.summary, scored)
