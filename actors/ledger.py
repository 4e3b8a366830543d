"""Every ordinal that was dispatched has exactly one fate: trained at one step, or left out with a cause.

The journal is append-only, one JSON object a line, in the run folder; `t` is in seconds since the run began. What was
sampled and not trained is waste, counted by cause.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from actors import journal
from actors.fates import NON_FINITE, Fates, Quarantined, Waste
from actors.pacer import ReadyGroup
from algorithms.bias import SelectionAudit
from algorithms.slots import Slot
from algorithms.types import GroupSummary, Update


class Ledger:
    """Writes the journal; the counts that the metrics and the summary report are what the journal says."""

    def __init__(self, path: Path) -> None:
        """A new journal, or one that goes on after `resume`."""
        self._path = path
        self._fates = Fates()
        self.num_lines = 0
        self._started = time.monotonic()
        self._file = path.open("a", encoding="utf-8")
        self.audit = SelectionAudit()
        """Whether what is trained differs from what is sampled."""

    @classmethod
    def begin(cls, path: Path, groups_per_batch: int) -> Self:
        """A new journal that says how many groups each step takes, so that it can be held to it."""
        ledger = cls(path)
        ledger._write("began", -1, groups_per_batch=groups_per_batch)
        return ledger

    @classmethod
    def resume(cls, path: Path, lines: int, version: int, groups_per_batch: int | None = None) -> Self:
        """Go on with a journal whose first `lines` lines count, at weight version `version`.

        `groups_per_batch`: of the steps from here on; None leaves it open, as journals of before it was written do.
        """
        journal.mend(path)
        ledger = cls(path)
        events = journal.read(path)
        ledger.num_lines = len(events)
        ledger._started -= max((event["t"] for event in events), default=0.0)
        event = {"event": "resumed", "ordinal": -1, "t": ledger._now(), "lines": lines, "version": version}
        if groups_per_batch is not None:
            event["groups_per_batch"] = groups_per_batch
        ledger._append(event)
        ledger._fates = journal.fates([*events, event])
        # Now, whatever becomes of this life: a line that is left in a buffer may be written behind those of the next.
        ledger.flush()
        return ledger

    @property
    def waste(self) -> dict[str, Waste]:
        return self._fates.waste

    @property
    def num_redispatched(self) -> int:
        return self._fates.num_redispatched

    @property
    def num_resumed(self) -> int:
        return self._fates.num_resumed

    @property
    def num_late(self) -> int:
        """Groups that arrived after another attempt of theirs had been accepted: dropped, never trained."""
        return self._fates.num_late

    @property
    def num_cuts(self) -> int:
        """How often the run went on from a checkpoint."""
        return self._fates.num_cuts

    @property
    def num_roll_backs(self) -> int:
        """How often a rule of health has made it go back, in this process and in those before."""
        return self._fates.num_roll_backs

    @property
    def num_trained(self) -> int:
        return sum(self._fates.trained.values())

    @property
    def num_duplicated(self) -> int:
        """Fates that an ordinal has beyond its first: trained again, left out again, or both."""
        return self._fates.num_doubled

    def num_left_out(self, cause: str) -> int:
        return sum(cause in causes for causes in self._fates.left_out.values())

    @property
    def num_skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        return len(self._fates.skipped)

    @property
    def num_quarantined(self) -> int:
        return self.num_left_out("quarantined")

    @property
    def quarantined_groups(self) -> list[Quarantined]:
        """What was set aside, in the order in which it was."""
        return list(self._fates.quarantined.values())

    @property
    def num_bad_rows(self) -> int:
        """Rows of the data set that could not be prompts; one that comes again in another epoch is counted once."""
        return len({found.row for found in self._fates.quarantined.values() if not found.dispatched})

    @property
    def num_given_up(self) -> int:
        """Groups that have failed too often."""
        return sum(found.dispatched for found in self._fates.quarantined.values())

    def lost(self) -> set[int]:
        """Ordinals without a fate; empty when the run is over."""
        return self._fates.lost()

    # Attempts ----------------------------------------------------------------------------------------------------

    def dispatched(self, slot: Slot, replica: int) -> None:
        self._write(
            "dispatched",
            slot.ordinal,
            attempt=slot.attempt,
            replica=replica,
            version=slot.version,
            resumed=slot.resumed,
        )

    def scored(self, summary: GroupSummary) -> None:
        self._write(
            "scored",
            summary.ordinal,
            attempt=summary.attempt,
            tokens_by_version={str(version): count for version, count in summary.tokens_by_version.items()},
            lengths=summary.num_loss_tokens_G,
            num_prompt_tokens=summary.num_prompt_tokens,
            generate_s=round(summary.generate_s, 6),
            score_s=round(summary.score_s, 6),
        )

    def interrupted(self, slot: Slot, num_tokens: int) -> None:
        """The attempt goes on elsewhere with the tokens that it has."""
        self._write("interrupted", slot.ordinal, attempt=slot.attempt, tokens=num_tokens)

    def stopped(self, slot: Slot, num_tokens: int, seconds: float) -> None:
        """The run is over and does not need the attempt any more."""
        self._write("stopped", slot.ordinal, attempt=slot.attempt, tokens=num_tokens, seconds=round(seconds, 6))

    def failed(self, slot: Slot, cause: str, waste: str = "failed") -> None:
        """The attempt is lost. `waste`: what its time counts as, such as `preempted` on a replica that was leaving."""
        other = {} if waste == "failed" else {"waste": waste}
        self._write("failed", slot.ordinal, attempt=slot.attempt, cause=cause, **other)

    def late(self, slot: Slot, num_tokens: int) -> None:
        self._write("late", slot.ordinal, attempt=slot.attempt, tokens=num_tokens)

    def requeued(self, slot: Slot, lengths: Sequence[int], rewards: Sequence[float | None], seconds: float) -> None:
        """The attempt could not be trained in time; its prompt is sampled again."""
        self.audit.left_out("requeued", lengths, rewards)
        self._write("requeued", slot.ordinal, attempt=slot.attempt, lengths=list(lengths), seconds=round(seconds, 6))

    # Fates -------------------------------------------------------------------------------------------------------

    def quarantined(self, slot: Slot, cause: str, row: int) -> None:
        """The row of the data set cannot be a prompt, or its group has failed too often."""
        self._write("quarantined", slot.ordinal, attempt=slot.attempt, cause=cause, row=row)

    def filtered(self, group: GroupSummary, cause: str, in_vain: bool = True, **step: int) -> None:
        """The group was sampled and scored, and is not trained: no signal, stale, surplus, or of a skipped step."""
        self.audit.left_out(cause, group.num_loss_tokens_G, group.rewards_G)
        waste = {"tokens": sum(group.num_loss_tokens_G), "seconds": round(group.generate_s, 6)} if in_vain else {}
        self._write("filtered", group.ordinal, attempt=group.attempt, cause=cause, **waste, **step)

    def unneeded(self, ordinals: Iterable[int]) -> None:
        """The run is over; over-sampled groups that had not come in time have been stopped."""
        for ordinal in ordinals:
            self._write("filtered", ordinal, cause="surplus")

    def trained(self, groups: Sequence[ReadyGroup], update: Update, oldest_version: int) -> None:
        """The update is made and published; its groups are never trained again.

        Tokens of weights older than `oldest_version` were masked. A step that was skipped trained none of them; they
        were sampled in vain, unless a critic has learned from them all the same.
        """
        in_vain = update.metrics.get("value/skipped") != 0.0
        for group in groups:
            if update.skipped:
                self.filtered(group.summary, NON_FINITE, in_vain, step=update.step, version=update.version)
                continue
            summary = group.summary
            self.audit.trained(summary.num_loss_tokens_G, summary.rewards_G)
            masked = sum(count for version, count in summary.tokens_by_version.items() if version < oldest_version)
            waste: dict[str, float] = {}
            if masked:
                share = masked / sum(summary.num_loss_tokens_G)
                waste = {"tokens": masked, "seconds": round(summary.generate_s * share, 6)}
            self._write("trained", group.slot.ordinal, step=update.step, version=update.version, **waste)
        self.flush()

    def rolled_back(self, cause: str) -> None:
        """A rule of health has decided to go back to a cut; on the disk when this returns, and never taken back."""
        self._write("rolled back", -1, cause=cause)
        self.flush()

    def flush(self) -> None:
        """What was written is on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _now(self) -> float:
        return round(time.monotonic() - self._started, 4)

    def _write(self, event: str, ordinal: int, **details: object) -> None:
        line = {"event": event, "ordinal": ordinal, "t": self._now(), **details}
        self._append(line)
        self._fates.apply(line)

    def _append(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self.num_lines += 1
