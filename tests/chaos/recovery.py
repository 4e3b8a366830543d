"""What the death of a replica costs, from the journal alone, and how soon its successor serves.

Of a run that has never gone back to a cut, so that times and versions only grow.
"""

import json
import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.faults import STARTED

_REPLICA = re.compile(r"replica (\d+): ")

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Recovery:
    """Both by the number of the replica."""

    steps_waited: dict[int, int]
    """Of one that died: steps that waited for its groups to be sampled again, beyond all other groups and for longer
    than a step usually takes."""
    publications: dict[int, int]
    """Of one that came for another: versions that were published from when its engine was there until a group went to
    it."""


def recovery(folder: Path) -> Recovery:
    lines = [json.loads(line) for line in (folder / "run" / "ledger.jsonl").read_text().splitlines()]
    assert not any(line["event"] == "resumed" for line in lines)
    started = [json.loads(line) for line in (folder / "faults" / STARTED).read_text().splitlines()]
    return Recovery(_steps_waited(lines), _publications(lines, started))


def _steps_waited(lines: list[Line]) -> dict[int, int]:
    """A step waits from when the one before is trained, and from when its other groups are there."""
    victims: dict[int, set[int]] = defaultdict(set)
    for line in lines:
        if line["event"] == "failed" and (found := _REPLICA.match(line["cause"])):
            victims[int(found[1])].add(line["ordinal"])
    scored = {line["ordinal"]: line["t"] for line in lines if line["event"] == "scored"}
    batches: dict[int, set[int]] = defaultdict(set)
    trained: dict[int, float] = {-1: 0.0}
    for line in lines:
        if line["event"] == "trained":
            batches[line["step"]].add(line["ordinal"])
            trained[line["step"]] = line["t"]
    usual_s = statistics.median(trained[step] - trained[step - 1] for step in batches)
    counts = dict.fromkeys(victims, 0)
    for replica, ordinals in victims.items():
        for step, batch in batches.items():
            again = [scored[ordinal] for ordinal in batch & ordinals]
            others = [scored[ordinal] for ordinal in batch - ordinals]
            counts[replica] += max(again, default=0.0) - max([*others, trained[step - 1]]) > usual_s
    return counts


def _publications(lines: list[Line], started: list[Line]) -> dict[int, int]:
    """Replicas that were there from the beginning are left out."""
    first: dict[int, int] = {}
    for line in lines:
        if line["event"] == "dispatched":
            first.setdefault(line["replica"], line["version"])
    born = {line["replica"]: line["version"] for line in started if line["version"] is not None}
    return {replica: first[replica] - version for replica, version in born.items() if replica in first}
