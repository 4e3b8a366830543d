"""One moment between two steps: what the pacer knew, where the journal stood, what the summary had counted."""

from pathlib import Path
from typing import Self

import msgspec

from actors.checkpoint.groups import SavedGroup, decode, encode
from algorithms.slots import PacerState


class Progress(msgspec.Struct):
    """What the summary of a run counts beyond the journal."""

    rewards: list[float] = []
    """Mean reward of each step."""
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


class Cut(msgspec.Struct, frozen=True):
    """A run goes on at weight version `version`.

    Not in it, and begun anew: how often a prompt, a reward or a replica has failed, what the rules of health have seen,
    a pipeline depth that was adapted, the audit of what is trained against what is sampled, and torch's random state,
    which dropout alone would use.
    """

    version: int
    lines: int
    """Of the journal, that count."""
    pacer: PacerState
    progress: Progress

    def write(self, folder: Path, groups: list[SavedGroup]) -> None:
        """Beside the policy's files; `groups` are those that are ready to be trained."""
        (folder / "cut.json").write_bytes(msgspec.json.encode(self))
        (folder / "groups.msgpack").write_bytes(encode(groups))

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, list[SavedGroup]]:
        """msgspec.MsgspecError when the files are not of this kind."""
        cut = msgspec.json.decode((folder / "cut.json").read_bytes(), type=cls)
        return cut, decode((folder / "groups.msgpack").read_bytes())
