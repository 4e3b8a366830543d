"""Scored groups without tokens, for tests of what only looks at summaries."""

from typing import Any

from actors.pacer import ReadyGroup
from algorithms.slots import Slot
from algorithms.types import GroupSummary


def ready(slot: Slot, version: int, rewards: tuple[float | None, float | None] = (0.0, 1.0)) -> ReadyGroup:
    summary = GroupSummary(
        ordinal=slot.ordinal,
        epoch=0,
        attempt=slot.attempt,
        replica=0,
        num_tokens_G=(4, 4),
        num_loss_tokens_G=(2, 2),
        num_prompt_tokens=2,
        truncated_G=(False, False),
        tokens_by_version_G=({version: 2},) * 2,
        rewards_G=rewards,
        scores={},
        failures={},
        generate_s=0.0,
        score_s=0.0,
    )
    scored: Any = None
    return ReadyGroup(slot, summary, scored)
