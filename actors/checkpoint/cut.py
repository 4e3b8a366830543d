"""One moment between two steps: what the pacer knew, where the journal stood, what the summary had counted."""

from pathlib import Path
from typing import Any, Self

import msgspec

from actors.checkpoint.best import Score
from actors.checkpoint.groups import SavedGroup, decode, encode
from actors.checkpoint.store import DamagedError
from algorithms.bias import AuditState
from algorithms.depth import DepthState
from algorithms.slots import PacerState

FORMAT = 2
"""Grows with every change that an older program could not read."""


class Progress(msgspec.Struct):
    """What the summary of a run counts beyond the journal."""

    rewards: list[float] = []
    """Mean reward of each step."""
    losses: list[float] = []
    """Of each step of a supervised run."""
    num_resumed: int = 0
    """How often a supervised run went on from a checkpoint; of others the journal tells."""
    max_staleness_seen: int = 0
    staleness_sum: int = 0
    """Over fresh tokens."""
    tokens_fresh: int = 0
    tokens_masked: int = 0
    tokens_trained: int = 0
    num_tokens: int = 0
    unscorable: int = 0
    reward_failures: dict[str, int] = {}
    """Failed reward calls by cause."""
    wall_s: float = 0.0


class Failures(msgspec.Struct, frozen=True):
    """What went wrong so far: the recipe's limits hold for the run, however often it goes on."""

    by_ordinal: dict[int, int] = {}
    """How often a prompt's group has failed."""
    filtered_in_a_row: int = 0


class Measured(msgspec.Struct, frozen=True):
    """What the run has measured of itself; in a file of its own: it is long, and JSON has no infinity."""

    audit: AuditState | None = None
    """Of what is trained against what is sampled."""
    depth: DepthState | None = None
    """When the recipe adapts the pipeline depth."""


class Cut(msgspec.Struct, frozen=True):
    """A run goes on at weight version `version`. Of a supervised run nothing is in flight, and there is no journal.

    Not in it, and begun anew: the mean length by which the router balances, what an interrupted attempt had sampled,
    the failures of rewards in a row, and what the rules of health have seen; and the budgets of what machines do
    (rollout.max_rebuilds, liveness.max_restarts, policy.max_restarts), which are of a process: who gives the command
    again gives them another chance. How often the run was rolled back is in the journal, which no cut takes back.
    """

    version: int
    lines: int
    """Of the journal, that count."""
    pacer: PacerState
    progress: Progress
    failures: Failures = Failures()
    measured: Measured = Measured()
    score: Score | None = None
    """When the recipe wants the best checkpoint kept."""
    num_rows: int | None = None
    """Of the data set: with another number the same ordinals are other rows. None in older checkpoints."""
    format: int = FORMAT

    def write(self, folder: Path, groups: list[SavedGroup]) -> None:
        """Beside the policy's files; `groups` are those that are ready to be trained."""
        (folder / "cut.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(self, measured=Measured())))
        (folder / "measured.msgpack").write_bytes(msgspec.msgpack.encode(self.measured))
        (folder / "groups.msgpack").write_bytes(encode(groups))

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, list[SavedGroup]]:
        """DamagedError names the file that is none of ours, ValueError one of another format."""
        written = _read(folder / "cut.json", lambda data: msgspec.json.decode(data, type=_Format)).format
        if written != FORMAT:
            raise ValueError(
                f"{folder / 'cut.json'}: the checkpoint is of format {written}, and this program reads {FORMAT}; "
                f"go on with the {'newer' if written > FORMAT else 'older'} program that wrote it, or begin anew with "
                "--overwrite"
            )
        cut: Self = _read(folder / "cut.json", lambda data: msgspec.json.decode(data, type=cls))
        measured = _read(folder / "measured.msgpack", lambda data: msgspec.msgpack.decode(data, type=Measured))
        return msgspec.structs.replace(cut, measured=measured), _read(folder / "groups.msgpack", decode)


class _Format(msgspec.Struct):
    format: int = 1


def _read(path: Path, decoded: Any) -> Any:
    try:
        return decoded(path.read_bytes())
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise DamagedError(f"{path}: {error}") from error
