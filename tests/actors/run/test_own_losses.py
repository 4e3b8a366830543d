"""Recipes with a loss of their own do what they say, from what a rank is told to what it computes.

The ranks are the policy's own code without DeepSpeed and without processes; whole runs are in
tests/deploy/test_methods.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.data.examples import data_examples
from actors.model.forward import PACKED_ATTENTION
from actors.model.head import put_scoring_head
from actors.model.load import load_causal_lm
from actors.model.lora import adapt
from actors.model.teacher import load_teacher
from actors.model.tiny import byte_tokenizer
from actors.pacer import ReadyGroup
from actors.policy import PolicyActor
from actors.policy_calls import ModelSource, ReferenceSums
from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe
from actors.reference import ReferenceActor
from actors.settings import policy_settings, reference_settings
from actors.weighing import ByPairs, ByTeacher, Lesson, Weights
from algorithms.packing import build_batch
from algorithms.slots import Slot
from algorithms.types import Batch, Group, GroupSummary, Prompt, Rollout, ScoredGroup, VersionSpan, summarize
from tests.actors.data.test_prompts import ListRows
from tests.actors.run.test_offline_recipes import Engine, LocalRanks

ROOT = Path(__file__).parents[3]
SMALL = ["algorithm.num_generations=2", "policy.max_tokens_per_micro_batch=40", "pools.policy.num_workers=2"]


@dataclass
class LocalPolicy(LocalRanks):
    """With what a step of GRPO's recipes asks beside."""

    asked: list[Batch] = field(default_factory=list)

    async def references(self, batch: Batch, groups: Sequence[Any]) -> dict[tuple[int, int], ReferenceSums]:
        self.asked.append(batch)
        found = {}
        for (rank, share, some), micro_batches in zip(self._shares(batch, groups), batch.ranks, strict=True):
            for micro, sums in zip(micro_batches, rank.references(share, *some), strict=True):
                found |= {(s.group, s.rollout): one for s, one in zip(micro.samples, sums, strict=True)}
        return found


def recipe_of(name: str, *overrides: str) -> GrpoRecipe:
    recipe = load_recipe(ROOT / f"recipes/methods/{name}.yaml", [*SMALL, *overrides])
    assert isinstance(recipe, GrpoRecipe)
    return recipe


def policy_of(recipe: GrpoRecipe, path: Path, folder: Path) -> LocalPolicy:
    settings = policy_settings(recipe, ModelSource(str(path)), folder)
    torch.manual_seed(0)
    model: Any = load_causal_lm(str(path), None, False, "float32", PACKED_ATTENTION)
    put_scoring_head(model)
    if settings.policy.lora is not None:
        adapt(model, settings.policy.lora)
    ranks = [PolicyActor(number, settings) for number in range(2)]
    for rank in ranks:
        rank.engine, rank.pad_id = Engine(model), 0
        if settings.teacher is not None:
            rank._teacher = load_teacher(settings.teacher, "float32")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return LocalPolicy(ranks, torch.optim.AdamW(trained, lr=5e-3))


def groups() -> list[ScoredGroup]:
    """Of two samples each, of which the judge prefers one; of the last group neither."""
    random = np.random.default_rng(0)
    made = []
    for number, rewards in enumerate([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (None, None)]):
        rollouts = []
        for length in random.integers(2, 9, 2):
            mask_T = np.arange(4 + length) >= 4
            ids_T = random.integers(4, 250, 4 + length).astype(np.int32)
            logprobs_T = np.where(mask_T, -5.0, 0.0).astype(np.float32)
            rollouts.append(Rollout(ids_T, mask_T, logprobs_T, (VersionSpan(0, 4, 4 + int(length)),), "stop"))
        group = Group(Prompt(number, 0, (1, 2, 3, 4), "", {}), tuple(rollouts), 0, 0)
        made.append(ScoredGroup(group, rewards, {}))
    return made


def ready(scored: Sequence[ScoredGroup]) -> list[ReadyGroup]:
    known: list[Any] = list(scored)
    return [ReadyGroup(Slot(each.group.prompt.ordinal, 0, 0, None), summarize(each, 0.0, 0.0), each) for each in known]


def build(summaries: Sequence[GroupSummary], weights: Weights | None = None) -> Batch:
    assert weights is not None, "no reward weighs here"
    return build_batch(
        summaries, weights, version=0, oldest_version=0, num_ranks=2, max_tokens=40, mask_truncated=False
    )


@pytest.mark.parametrize("below", [True, False], ids=["below-adapter", "worker"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
async def test_online_dpo_learns_what_the_judge_prefers(
    tiny_models: dict[str, Path], tmp_path: Path, loss_type: str, below: bool
) -> None:
    path = tiny_models["untied"]
    recipe = recipe_of("online_dpo", f"online_dpo.loss_type={loss_type}", *["policy.lora={r: 4}"] * below)
    assert recipe.online_dpo is not None
    policy, scored = policy_of(recipe, path, tmp_path), groups()
    if not below:
        settings = reference_settings(recipe, ModelSource(str(path)))
        assert settings.temperature == 1.0
        worker = ReferenceActor(settings)
        scored = [ScoredGroup(worker.score(each.group), each.rewards_G, {}) for each in scored]
    anyone: Any = policy
    weighing = ByPairs(anyone, recipe.online_dpo, recipe.algorithm.beta, mask_truncated=False)
    lessons: list[Lesson] = []
    for _ in range(6):
        lessons.append(await weighing.lesson(ready(scored), build))
        await policy.step(lessons[-1].batch, lessons[-1].groups)  # type: ignore[arg-type]
    first, last = lessons[0].metrics, lessons[-1].metrics
    assert first["pairs"] == 3
    assert abs(first["rewards/margins"]) < 1e-5, "before the first step the policy is its reference"
    assert abs(first["kl"]) < 1e-5
    assert last["loss"] < first["loss"]
    assert last["rewards/accuracies"] == 1.0
    samples = [sample for rank in lessons[0].batch.ranks for micro in rank for sample in micro.samples]
    assert {sample.group for sample in samples} == {0, 1, 2}, "without a verdict nothing is learned"


async def test_a_batch_without_a_preference_is_a_step_without_samples(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_of("online_dpo")
    assert recipe.online_dpo is not None
    policy: Any = policy_of(recipe, tiny_models["untied"], tmp_path)
    lesson = await ByPairs(policy, recipe.online_dpo, 0.1, False).lesson(ready(groups()[-1:]), build)
    assert not any(micro.samples for rank in lesson.batch.ranks for micro in rank)
    assert not policy.asked
    assert lesson.metrics["loss"] == 0.0


@pytest.mark.parametrize("lmbda", [0.5, 1.0])
async def test_gkd_brings_the_student_to_its_teacher(
    tiny_models: dict[str, Path], tmp_path: Path, lmbda: float
) -> None:
    teacher = f"reference={{kind: pretrained, path: {tiny_models['other']}}}"
    recipe = recipe_of("gkd", teacher, f"distillation.lmbda={lmbda}")
    policy: Any = policy_of(recipe, tiny_models["untied"], tmp_path)
    rows = ListRows(tuple({"prompt": "ab", "completion": "x" * (1 + row)} for row in range(9)))
    weighing = ByTeacher(lmbda, 3, data_examples(recipe, rows, byte_tokenizer(256)))
    losses = []
    for _ in range(6):
        lesson = await weighing.lesson(ready(groups()), build)
        losses.append((await policy.step(lesson.batch, lesson.groups)).metrics["loss"])
    samples = [sample for rank in lesson.batch.ranks for micro in rank for sample in micro.samples]
    assert len(samples) == (8 if lmbda == 1 else 11)
    assert 0 < losses[-1] < 0.9 * losses[0]
