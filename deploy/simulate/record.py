"""What a run folder tells of how long things took; a folder that does not is a ValueError that says so."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.fates import NON_FINITE
from actors.recipe.file import load_stored
from actors.recipe.schema import GrpoRecipe

Line = Mapping[str, Any]

_NOT_NEEDED = ("stale", "surplus", NON_FINITE)
"""The causes of the pacer and the policy for leaving a group out; the others are about its rewards."""
_AGAIN = "it is of an older Paceline; make the run again"


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One attempt that was scored; seconds count from the beginning of the run."""

    replica: int
    started_s: float
    generated_s: float
    score_s: float
    lengths: tuple[int, ...]
    num_prompt_tokens: int
    whole: bool = True
    """Sampled by this attempt alone: it does not go on from what an interrupted one had left."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run's recipe, groups, swaps and metrics."""

    folder: Path
    recipe: GrpoRecipe
    groups: tuple[GroupRecord, ...]
    """In the order in which they were scored."""
    swapped_s: tuple[float, ...]
    """When each version after the first was committed, about."""
    filtered_share: float
    steps: tuple[Line, ...]
    """The metrics of each step."""


def read_run(folder: Path) -> RunRecord:
    """All of it; ValueError names what is missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    for name in ("recipe.yaml", "ledger.jsonl", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}, so it is not the folder of a run")
    recipe = load_stored(folder / "recipe.yaml")
    if not isinstance(recipe, GrpoRecipe):
        raise ValueError(f"{folder}: is a run of kind {recipe.kind!r}, which samples nothing")
    path = folder / "ledger.jsonl"
    ledger, steps = _read_lines(path), _read_lines(folder / "metrics.jsonl")
    scored = [line for line in ledger if line.get("event") == "scored"]
    filtered = sum(line.get("event") == "filtered" and line.get("cause") not in _NOT_NEEDED for line in ledger)
    groups = _groups(path, ledger, scored)
    stepped = [line for line in ledger if line.get("event") == "trained" or line.get("cause") == NON_FINITE]
    committed = {line["version"]: _required(path, line, "t") for line in stepped}
    if not groups or min(len(steps), len(committed)) < 2:
        raise ValueError(f"{folder}: at least 2 steps are needed to learn how long things take, it holds {len(steps)}")
    return RunRecord(
        folder=folder,
        recipe=recipe,
        groups=groups,
        swapped_s=tuple(sorted(committed.values())),
        filtered_share=min(0.99, round(filtered / len(scored), 4)),
        steps=tuple(steps),
    )


def read_lengths(path: str) -> tuple[tuple[int, ...], ...]:
    """The completion lengths of each group in a run folder, or in a ledger."""
    ledger = Path(path) / "ledger.jsonl" if Path(path).is_dir() else Path(path)
    if not ledger.is_file():
        raise ValueError(f"{ledger}: there is no such ledger; name a run folder or its ledger.jsonl")
    lines = [line for line in _read_lines(ledger) if line.get("event") == "scored"]
    lengths = tuple(tuple(_required(ledger, line, "lengths")) for line in lines)
    if not lengths:
        raise ValueError(f"{ledger}: no group was scored in this run, so there are no lengths to draw from")
    return lengths


def _groups(path: Path, ledger: list[Line], scored: list[Line]) -> tuple[GroupRecord, ...]:
    replicas = {
        (line["ordinal"], line["attempt"]): line["replica"] for line in ledger if line.get("event") == "dispatched"
    }
    interrupted = {line["ordinal"] for line in ledger if line.get("event") == "interrupted"}
    groups = []
    for line in scored:
        score_s = _required(path, line, "score_s")
        generated_s = _required(path, line, "t") - score_s
        groups.append(
            GroupRecord(
                replica=replicas[line["ordinal"], line["attempt"]],
                started_s=generated_s - _required(path, line, "generate_s"),
                generated_s=generated_s,
                score_s=score_s,
                lengths=tuple(_required(path, line, "lengths")),
                num_prompt_tokens=_required(path, line, "num_prompt_tokens"),
                whole=line["ordinal"] not in interrupted,
            )
        )
    return tuple(groups)


def metric(run: RunRecord, name: str) -> list[float]:
    """One metric over the steps; it must be there."""
    return [_required(run.folder / "metrics.jsonl", line, name) for line in run.steps]


def _required(path: Path, line: Line, key: str) -> Any:
    if key not in line:
        raise ValueError(f"{path}: its lines have no {key!r}: {_AGAIN}")
    return line[key]


def _read_lines(path: Path) -> list[Line]:
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error.msg}") from None
        if not isinstance(line, dict) or not ("event" in line or "step" in line):
            raise ValueError(f"{path}: line {number} is neither of a ledger nor of metrics")
        lines.append(line)
    return lines
