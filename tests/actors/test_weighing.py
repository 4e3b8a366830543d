"""Where the reference is below the policy's adapter, a batch weighs what it weighs with reference workers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from actors.data.examples import ExampleStream
from actors.model.tiny import byte_tokenizer
from actors.pacer import ReadyGroup
from actors.policy_calls import ReferenceSums
from actors.weighing import ByKl, ByRewards, ByTeacher, Weights
from algorithms.config import GrpoConfig
from algorithms.packed import pack_row
from algorithms.packing import build_batch
from algorithms.signal import Signal, signal
from algorithms.slots import Slot
from algorithms.types import Batch, GroupSummary, KlSums, num_trained_tokens
from tests.actors.data.test_prompts import ListRows

RLOO: dict[str, Any] = {"baseline": "leave_one_out", "scale_rewards": "none", "kl_penalty": "reward", "beta": 0.3}
TO_GO: dict[str, Any] = {
    "baseline": "none",
    "scale_rewards": "none",
    "normalize_advantages": "tokens",
    "kl_penalty": "reward_to_go",
    "beta": 0.3,
}


def sums(group: int, rollout: int) -> KlSums:
    return KlSums(0.5 + group - 0.2 * rollout, 1.0 + group, 2.0 + rollout)


def ready(group: int) -> ReadyGroup:
    summary = GroupSummary(
        ordinal=group,
        epoch=0,
        attempt=0,
        replica=0,
        num_tokens_G=(7, 9, 8),
        num_loss_tokens_G=(3, 5, 4),
        num_prompt_tokens=4,
        truncated_G=(False, True, False),
        tokens_by_version_G=({0: 3}, {0: 5}, {0: 4}),
        rewards_G=(1.0, 0.25 * group, None),
        scores={},
        failures={},
        generate_s=0.0,
        score_s=0.0,
    )
    scored: Any = f"group {group}"
    return ReadyGroup(Slot(group, 0, 0, None), summary, scored)


class Policy:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def references(self, batch: Batch, groups: Sequence[Any]) -> dict[tuple[int, int], ReferenceSums]:
        self.asked = list(groups)
        samples = [sample for rank in batch.ranks for micro in rank for sample in micro.samples]
        return {(s.group, s.rollout): ReferenceSums(-1.0, sums(s.group, s.rollout)) for s in samples}


@pytest.mark.parametrize("method", [RLOO, TO_GO], ids=["rloo", "reinforce++"])
@pytest.mark.parametrize("mask_truncated", [False, True])
async def test_a_batch_is_that_of_reference_workers(method: dict[str, Any], mask_truncated: bool) -> None:
    config = GrpoConfig(num_generations=3, **method)
    assert config.sums_the_kl

    def build(summaries: Sequence[GroupSummary], weights: Weights | None = None) -> Batch:
        worth = signal(summaries, config, 10) if weights is None else Signal(weights, 0.0)
        return build_batch(
            summaries,
            worth.advantages,
            version=1,
            oldest_version=0,
            num_ranks=2,
            max_tokens=20,
            mask_truncated=mask_truncated,
            kl_weight=worth.kl_weight,
        )

    groups, policy = [ready(0), ready(1)], Policy()
    anyone: Any = policy
    lesson = await ByKl(anyone).lesson(groups, build)
    workers = [
        replace(group, summary=replace(group.summary, kl_G=tuple(sums(place, r) for r in range(3))))
        for place, group in enumerate(groups)
    ]
    assert lesson == await ByRewards().lesson(workers, build)
    assert lesson.groups == policy.asked == ["group 0", "group 1"]
    free = [replace(group, summary=replace(group.summary, kl_G=(KlSums(),) * 3)) for group in groups]
    assert lesson.batch != (await ByRewards().lesson(free, build)).batch, "the divergence must cost something"


def build(summaries: Sequence[GroupSummary], weights: Weights | None = None) -> Batch:
    """What a controller at version 5 does, whose truncated rollouts are masked."""
    return build_batch(
        summaries,
        weights if weights is not None else [(1.0,) * 3] * len(summaries),
        version=5,
        oldest_version=3,
        num_ranks=2,
        max_tokens=40,
        mask_truncated=True,
    )


def weights_of(batch: Batch) -> dict[tuple[int, int], float]:
    return {(s.group, s.rollout): s.advantage for rank in batch.ranks for micro in rank for s in micro.samples}


async def test_a_step_of_distillation_learns_samples_and_its_own_examples() -> None:
    """Every sample of the student weighs lmbda together, whatever its reward; the data's completions weigh the rest."""
    rows = tuple({"prompt": "ab", "completion": "x" * (1 + row)} for row in range(9))
    stream = ExampleStream(ListRows(rows), byte_tokenizer(256), 0, False, 60)
    lesson = await ByTeacher(0.25, 2, stream).lesson([ready(0), ready(1)], build)
    weights = weights_of(lesson.batch)
    assert weights.keys() == {(0, 0), (0, 2), (1, 0), (1, 2), (2, 0), (3, 0)}, "truncated samples are left out"
    assert all(weights[place] == pytest.approx(0.25 / 14) for place in list(weights) if place[0] < 2)
    examples: list[Any] = list(lesson.groups[2:])
    learned = [example.rollouts[0] for example in examples]
    assert [rollout.num_loss_tokens for rollout in learned] == [3, 4], "row 10 % 9 and the next, each with EOS"
    assert [weights[2, 0], weights[3, 0]] == pytest.approx([0.75 / 7] * 2)
    row = pack_row(learned, [0.0, 0.0], 0, lesson.batch.oldest_version, lesson.batch.version)
    assert row.fresh_N.all()
    assert row.age_N.max() == 0
    assert num_trained_tokens(lesson.batch, [ready(0).summary, ready(1).summary]) == 0, "theirs are of version 0"


async def test_without_examples_the_samples_are_all_that_is_learned() -> None:
    lesson = await ByTeacher(1.0, 2, None).lesson([ready(0)], build)
    assert set(weights_of(lesson.batch).values()) == {1 / 7}
    assert lesson.groups == ["group 0"]
