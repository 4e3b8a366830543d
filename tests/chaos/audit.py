"""What a run has lost, done twice or hidden, from its files alone, and counted in two ways that share no code.

The first way is the ledger verb's. The second reads the journal by itself, and holds it against the policy's own record
of the ordinals of each step and against the checks that the policy has made of every token and every reward.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.journal import fates, read
from deploy.ledger import show


@dataclass(frozen=True, slots=True)
class Audit:
    """All but `groups`, `left_out` and `recovery_steps_max` must be 0."""

    groups: int
    """That were trained."""
    left_out: int
    """Groups that were set aside, filtered, or not needed."""
    lost: int
    duplicated: int
    unknown_version_tokens: int
    silent_zero_rewards: int
    recovery_steps_max: int
    notes: tuple[str, ...]
    """What was found, in words."""


def audit(folder: Path, groups_per_batch: int, num_steps: int) -> Audit:
    """Of a run that is complete."""
    run = folder / "run"
    notes: list[str] = []
    found = fates(read(run / "ledger.jsonl"))
    if not show(run):
        notes.append("python -m deploy ledger: the journal is not consistent")
    lost = set(found.lost())
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    standing = _standing(lines)
    by_step = _by_step(standing)
    booked = _trained_in(by_step)
    if booked != found.trained:
        notes.append("the two counts of the journal differ")
    dispatched = {line["ordinal"] for line in standing if line["event"] == "dispatched"}
    fated = _fated(standing)
    # One that was skipped; of a row that can be no prompt it is set aside before it is sent.
    lost |= set(range(max(dispatched, default=-1) + 1)) - dispatched - set(fated)
    lost |= dispatched - set(fated)
    if {step: len(by_step[step]) for step in by_step} != dict.fromkeys(range(num_steps), groups_per_batch):
        notes.append("some step has not trained as many groups as the others")
    trained = _trained(run / "model" / "policy.json")
    if trained is not None:
        own = Counter(ordinal for ordinals in trained for ordinal in ordinals)
        lost |= set(booked) - set(own)
        booked = booked | own
        if own != found.trained or [sorted(by_step[step]) for step in sorted(by_step)] != trained:
            notes.append("the policy has trained other groups than the journal says")
    left_out = fated - _trained_in(by_step)
    duplicated = sum(count - 1 for count in (booked + left_out).values()) + len(set(booked) - set(found.trained))
    notes += [f"ordinal {ordinal} has {count} fates" for ordinal, count in sorted(fated.items()) if count > 1]
    tokens, rewards = _findings(folder / "faults" / "findings.txt", notes)
    tokens += _uncommitted(lines, notes)
    if notes and not (lost or duplicated or tokens or rewards):
        lost.add(-1)  # whatever it is, the books are not in order
    steps = max(_redone(lines), default=0)
    return Audit(len(found.trained), left_out.total(), len(lost), duplicated, tokens, rewards, steps, tuple(notes))


def _standing(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that count: a `resumed` line takes back all from the line on that it names."""
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines):
        if line["event"] == "resumed":
            kept = [(other, past) for other, past in kept if other < line["lines"]]
        else:
            kept.append((number, line))
    return [line for _, line in kept]


def _by_step(standing: list[dict[str, Any]]) -> dict[int, list[int]]:
    by_step: dict[int, list[int]] = {}
    for line in standing:
        if line["event"] == "trained":
            by_step.setdefault(line["step"], []).append(line["ordinal"])
    return by_step


def _trained_in(by_step: dict[int, list[int]]) -> Counter[int]:
    return Counter(ordinal for ordinals in by_step.values() for ordinal in ordinals)


def _fated(standing: list[dict[str, Any]]) -> Counter[int]:
    """How many fates each ordinal has: trained, filtered or quarantined."""
    return Counter(line["ordinal"] for line in standing if line["event"] in ("trained", "filtered", "quarantined"))


def _trained(path: Path) -> list[list[int]] | None:
    """The light policy's record, which its checkpoints carry; a real one keeps none."""
    if not path.exists():
        return None
    trained: list[list[int]] = json.loads(path.read_text())["trained"]
    return trained


def _findings(path: Path, notes: list[str]) -> tuple[int, int]:
    """Tokens and rewards that the policy found wrong before it trained on them."""
    lines = path.read_text().splitlines() if path.exists() else []
    notes.extend(lines)
    counts = {"tokens": 0, "reward": 0}
    for line in lines:
        kind, count, *_ = line.split()
        counts[kind] += int(count)
    return counts["tokens"], counts["reward"]


def _uncommitted(lines: list[dict[str, Any]], notes: list[str]) -> int:
    """Tokens of a version that nobody had made yet: newer than the one that was being published, at the newest."""
    version = count = 0
    for line in lines:
        match line["event"]:
            case "resumed" | "trained":
                version = line["version"]
            case "scored":
                newer = sum(n for label, n in line["tokens_by_version"].items() if int(label) > version + 1)
                if newer:
                    notes.append(f"ordinal {line['ordinal']}: {newer} tokens of versions beyond {version}")
                count += newer
    return count


def _redone(lines: list[dict[str, Any]]) -> Iterator[int]:
    """Steps that were taken again, each time that the run went back to a cut."""
    version = 0
    for line in lines:
        match line["event"]:
            case "trained":
                version = line["version"]
            case "resumed":
                yield version - line["version"]
                version = line["version"]
