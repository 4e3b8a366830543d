"""Cuts are taken while a run goes on: training stands still while the policy is copied to the host, and no longer.

The copy is written in the background. A cut that cannot be written is told and does not end the run; but when the last
one cannot, the run does not end as if all were well.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from ray.exceptions import RayError
from transformers import PreTrainedTokenizerBase

from actors.checkpoint.best import Watch
from actors.checkpoint.config import CheckpointConfig
from actors.checkpoint.cut import Cut
from actors.checkpoint.groups import SavedGroup
from actors.checkpoint.store import CheckpointStore
from actors.deadline import DeadlineError, aside, within
from actors.errors import PolicyLostError, RunError, SpoiledError
from actors.model.files import MODEL
from actors.pacer import ReadyGroup
from actors.policy_group import PolicyGroup
from actors.turns import Turns

CRITIC = "critic"
"""The folder of a checkpoint that holds the critic, in files as the policy's are."""
_FETCH_TIMEOUT_S = 60.0
# Of Ray, the disk, or a column of the data set that is no JSON.
_WORTH_NO_RUN = (
    OSError, RunError, RayError, msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError,
    NotImplementedError,
)  # fmt: skip


@dataclass(slots=True)
class Checkpointer:
    """`after` every step."""

    store: CheckpointStore
    config: CheckpointConfig
    num_steps: int
    policy: PolicyGroup
    tokenizer: PreTrainedTokenizerBase
    """Lies beside the weights: each checkpoint is a model that others load."""
    moment: Callable[[int], tuple[Cut, list[ReadyGroup]]]
    """What the run knows at this version, and the scored groups that wait; awaits nothing, so it is of one moment."""
    metrics: Callable[[], Mapping[str, float]]
    """Of the last step."""
    say: Callable[[str], None]
    healthy: Callable[[], bool]
    """Whether a cut of this moment is one to go back to; one that is not must not take the place of one that is."""
    critic: PolicyGroup | None = None
    """Its ranks hold a part of the cut, of the same version."""
    turns: Turns | None = None
    """Where engines are built on the GPUs of those who are copied, whose memory that takes: a cut that is due then
    waits for the next step, except the last one."""
    cut_version: int | None = None
    """Of the last cut; that from which the run goes on."""
    stall_s: float = 0.0
    """Training has stood still for cuts so long, in all."""
    _overdue: bool = False
    _writing: asyncio.Task[None] | None = None
    _taken: tuple[Cut, list[ReadyGroup]] | None = None
    """The last cut; the policy keeps its part until that is written."""
    _failed: RunError | None = None
    """Why it could not be written."""
    _watch: Watch | None = None

    def __post_init__(self) -> None:
        if self.config.best is not None:
            self._watch = Watch(self.config.best.metric)

    async def after(self, version: int) -> None:
        """A cut, if one is due, the run goes on and all is well; one that is due waits until all is well."""
        warning = None if self._watch is None else self._watch.saw(self.metrics())
        if warning is not None:
            self.say(f"warning: {warning}")
        due = self._overdue or (self.config.every > 0 and version % self.config.every == 0)
        self._overdue = due and not await self._may_cut()
        if due and not self._overdue and version < self.num_steps:
            async with contextlib.nullcontext() if self.turns is None else self.turns.computing():
                await self.cut(version)

    async def _may_cut(self) -> bool:
        if not self.healthy():
            return False
        await self.finish()  # first, for it computes nothing and may take long
        return self.turns is None or not self.turns.num_building

    async def last(self, version: int) -> int | None:
        """The run stops here: a cut, on the disk when this returns; RunError when it could not be written.

        A cut that is none to go back to is not taken, or given up: the last good one stays the newest. Returns the
        version from which the same command goes on; None when there is no cut at all.
        """
        if version == self.cut_version or self.healthy():
            await self._last(version)
        else:
            await self.finish()
            self._keep_good(version, "a rule of health that goes back, or a loss that is not finite, speaks against it")
        return max(self.store.versions(), default=None)

    async def _last(self, version: int) -> None:
        begun = version == self.cut_version and self._writing is not None
        if version != self.cut_version:
            await self.cut(version)
        try:
            await self._written()
        except RunError as error:
            if isinstance(error.__cause__, SpoiledError):
                self._keep_good(version, str(error.__cause__))
                return
            if not begun or not _may_be_tried_again(error):
                raise _told(error) from None
            self.say(f"warning: {error}; it is tried once more")
            await self._again()

    async def conclude(self) -> None:
        """The run has come to its end: the last cut is on the disk when this returns; RunError when it cannot be."""
        await self.finish()
        if self._failed is None or isinstance(self._failed.__cause__, SpoiledError):
            return
        if not _may_be_tried_again(self._failed):
            raise _told(self._failed)
        await self._again()

    async def _again(self) -> None:
        """Write the last cut once more."""
        assert self._taken is not None
        cut, ready = self._taken
        self.cut_version, self._failed = cut.version, None
        self._writing = asyncio.create_task(self._write(cut, ready), name="checkpoint")
        try:
            await self._written()
        except RunError as error:
            raise _told(error) from None

    def _keep_good(self, version: int, why: str) -> None:
        good = max(self.store.versions(), default=None)
        goes_on = "there is none before it: the same command begins anew" if good is None else f"that of {good} is kept"
        self.say(f"warning: no checkpoint of version {version} is left ({why}); {goes_on}")

    async def cut(self, version: int) -> None:
        """Take one; the one before must have been written."""
        started = time.monotonic()
        await self.finish()
        self.cut_version = version
        self._taken = self._failed = None
        cut, ready = self.moment(version)
        if self._watch is not None:
            cut = msgspec.structs.replace(cut, score=self._watch.take())
        await self._snapshot()
        self._taken = cut, ready
        self._writing = asyncio.create_task(self._write(cut, ready), name="checkpoint")
        self.stall_s += time.monotonic() - started

    async def _snapshot(self) -> None:
        learners = (learner for learner in (self.policy, self.critic) if learner is not None)
        done = await asyncio.gather(*(learner.snapshot() for learner in learners), return_exceptions=True)
        for outcome in done:  # nobody copies any more when this returns
            if outcome is not None:
                raise outcome

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
            await within(timeout_s or self.config.timeout_s, writing, "writing it")
        except _WORTH_NO_RUN as error:
            version, self.cut_version = self.cut_version, None  # whoever stops at this version takes another
            self._failed = RunError(f"the checkpoint of version {version} could not be written: {error}")
            raise self._failed from error
        self._taken = None

    async def _write(self, cut: Cut, ready: list[ReadyGroup]) -> None:
        groups = [await _saved(group) for group in ready]
        timeout_s = self.config.timeout_s
        folder = await within(timeout_s, aside(self._stage, cut, groups), "staging a checkpoint")
        await self.policy.write_snapshot(folder, timeout_s)
        if self.critic is not None:
            await self.critic.write_snapshot(folder / CRITIC, timeout_s)
        await within(timeout_s, aside(self.store.commit, cut.version), "committing a checkpoint")
        with contextlib.suppress(OSError):  # the checkpoint is there
            self._tell(await within(timeout_s, aside(self.store.left_over), "looking for what is left over"))

    def _tell(self, left_over: list[Path]) -> None:
        if left_over:
            self.say(
                f"warning: {left_over[0]} cannot be removed ({len(left_over)} such in all), and the disk fills; remove "
                "what is older than the newest checkpoints by hand"
            )

    def _stage(self, cut: Cut, groups: list[SavedGroup]) -> Path:
        folder = self.store.stage(cut.version)
        cut.write(folder, groups)
        self.tokenizer.save_pretrained(folder / MODEL)
        if self.critic is not None:
            self.tokenizer.save_pretrained(folder / CRITIC / MODEL)
        return folder


def _may_be_tried_again(error: RunError) -> bool:
    """Not what would come out the same, nor what may still be under way, nor of a policy that is gone."""
    return not isinstance(error.__cause__, SpoiledError | DeadlineError | PolicyLostError)


def _told(error: RunError) -> RunError:
    """What ends the run; a policy that is lost is lost, whatever it was doing."""
    return error.__cause__ if isinstance(error.__cause__, PolicyLostError) else error


async def _saved(group: ReadyGroup) -> SavedGroup:
    slot = group.slot
    scored = await within(_FETCH_TIMEOUT_S, group.scored, f"fetching group {slot.ordinal} for a checkpoint")
    return SavedGroup(slot.attempt, slot.version, slot.resumed, group.summary, scored)
