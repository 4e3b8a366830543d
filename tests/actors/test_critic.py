"""A critic learns what its batches earn, the same on any ranks, and goes on from a checkpoint as if nothing was."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.critic import CriticActor, critic_actor
from actors.critic_group import CriticGroup, CriticLesson
from actors.model.forward import PACKED_ATTENTION, row_values
from actors.model.load import load_scorer
from actors.objective import Objective
from actors.policy_calls import PolicySettings, RankBatch
from actors.policy_group import PolicyGroup
from algorithms.config import GrpoConfig, OptimizerConfig
from algorithms.losses import Normalizer
from algorithms.packed import pack_row
from algorithms.types import Group, GroupSummary, MicroBatch, Prompt, Sample, ScoredGroup, summarize
from tests.actors.test_policy import batch as policy_batch
from tests.actors.test_policy import rollouts, settings_of
from tests.algorithms.test_gae import schulman
from tests.prove import ONLY_PROVE

Answer = TypeVar("Answer")
GAE = GrpoConfig(
    advantage="gae", baseline="none", scale_rewards="none", num_generations=1, lam=0.9, normalize_advantages="tokens"
)
MAX_TOKENS = 20


def earned() -> list[float | None]:
    """What a rollout earns can be read from its first token; one has no reward."""
    rewards: list[float | None] = [float(rollout.token_ids_T[0] % 5) for rollout in rollouts()]
    rewards[3] = None
    return rewards


def summaries() -> list[GroupSummary]:
    _, groups = policy_batch(1, MAX_TOKENS, 0, 0)
    return [
        summarize(ScoredGroup(group, (reward,), {}), 0.0, 0.0) for group, reward in zip(groups, earned(), strict=True)
    ]


def with_critic(
    settings: PolicySettings, use: Callable[[CriticGroup], Awaitable[Answer]], algorithm: GrpoConfig = GAE
) -> Answer:
    """What `use` makes of a critic that has started."""
    import ray

    objective = Objective(algorithm, 1.0, 16, numbers="values", cliprange_value=0.5)
    settings = replace(settings, objective=objective, optimizer=OptimizerConfig(learning_rate=3e-3))
    actor = critic_actor().options(num_cpus=0.5)
    ranks = tuple(actor.remote(rank, settings) for rank in range(settings.num_ranks))

    async def run() -> Answer:
        group = PolicyGroup(ranks, 16, 60.0, who="critic", team_size=settings.policy.sequence_parallel_size)
        await group.start(120.0)
        return await use(CriticGroup(group, algorithm, MAX_TOKENS, 0))

    try:
        return asyncio.run(run())
    finally:
        for rank in ranks:
            ray.kill(rank)


async def step(critic: CriticGroup, version: int, oldest_version: int = 0) -> tuple[CriticLesson, dict[str, float]]:
    batch, groups = policy_batch(1, MAX_TOKENS, version, oldest_version)
    lesson = await critic.compute_values(summaries(), groups, batch)
    return lesson, await critic.train_step(lesson, groups)


def returns_of(lesson: CriticLesson) -> dict[int, np.ndarray]:
    samples = (sample for rank in lesson.batch.ranks for micro in rank for sample in micro.samples)
    return {sample.group: sample.advantages_L for sample in samples if sample.advantages_L is not None}


def test_a_rank_says_what_each_token_was_worth(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Without DeepSpeed: the model itself stands in for the engine."""
    algorithm = GAE.model_copy(update={"kl_penalty": "reward", "beta": 0.1, "gamma": 0.9})
    settings = settings_of(tiny_models["untied"], tmp_path, 1, 0, "float32")
    rank = CriticActor(0, replace(settings, objective=Objective(algorithm, 1.0, 16, numbers="values")))
    torch.manual_seed(0)
    model: Any = load_scorer(str(tiny_models["untied"]), None, False, "float32", PACKED_ATTENTION)
    rank.engine, rank.pad_id = model, 0
    made = [replace(r, reference_logprobs_T=r.logprobs_T - 0.25 * r.loss_mask_T) for r in rollouts()[:3]]
    groups = [Group(Prompt(i, 0, (), "", {}), (rollout,), 0, 0) for i, rollout in enumerate(made)]
    micro_batches = (
        MicroBatch((Sample(2, 0, made[2].num_tokens, -1.0), Sample(0, 0, made[0].num_tokens, 2.0))),
        MicroBatch(()),
        MicroBatch((Sample(1, 0, made[1].num_tokens, 0.5),)),
    )
    found = rank.compute_values(RankBatch(micro_batches, Normalizer(3, 15, 16, 2), oldest_version=1), *groups)
    assert [len(micro) for micro in found] == [2, 0, 1]
    for micro, assessed in zip(micro_batches, found, strict=True):
        for sample, one in zip(micro.samples, assessed, strict=True):
            rollout = made[sample.group]
            with torch.no_grad():
                values = row_values(model, pack_row([rollout], [0.0], 0)).tolist()
            rewards = [-0.1 * 0.25] * rollout.num_loss_tokens
            rewards[-1] += sample.advantage
            expected = schulman(rewards, values, 0.9, 0.9)
            assert one.advantages_L.tolist() == pytest.approx(expected, abs=1e-5)
            assert (one.returns_L - one.advantages_L).tolist() == pytest.approx(values, abs=1e-5)
            old = (rollout.num_loss_tokens + 1) // 2  # the first half is of version 0
            assert one.fresh_L.tolist() == [False] * old + [True] * (rollout.num_loss_tokens - old)
    assert model.training, "it goes on learning"


@pytest.mark.cluster
def test_a_critic_learns_what_is_earned_and_goes_on_from_where_it_was(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(tiny_models["untied"], tmp_path, 1, 1, "float32")

    async def learn(critic: CriticGroup) -> tuple[list[tuple[CriticLesson, dict[str, float]]], dict[str, float]]:
        steps = [await step(critic, version) for version in range(30)]
        await asyncio.to_thread((tmp_path / "cut").mkdir)
        await critic.ranks.snapshot()
        await critic.ranks.write_snapshot(tmp_path / "cut", 60.0)
        _, after = await step(critic, 30)
        return steps, after

    steps, after = with_critic(settings, learn)
    first, last = steps[0], steps[-1]
    assert last[1]["value/loss"] < first[1]["value/loss"] / 4
    assert last[1]["value/explained_variance"] > 0.6 > first[1]["value/explained_variance"]
    assert last[1]["value/learning_rate"] == pytest.approx(3e-3)
    assert {"value/clip_fraction", "value/grad_norm", "value/skipped", "time/critic_values_s"} <= set(last[1])
    assert not any(name.startswith(("policy", "loss")) for name in last[1])

    lengths = {place: rollout.num_loss_tokens for place, rollout in enumerate(rollouts())}
    lesson = first[0]
    assert set(lesson.advantages) == {(place, 0) for place in lengths if place != 3}, "no reward, no lesson"
    assert all(len(advantages) == lengths[place] for (place, _), advantages in lesson.advantages.items())
    every = np.concatenate(list(lesson.advantages.values()))
    assert every.mean() == pytest.approx(0, abs=1e-5)
    assert every.std(ddof=1) == pytest.approx(1, abs=1e-3)
    assert lesson.batch.num_loss_tokens == sum(count for place, count in lengths.items() if place != 3)
    for place, returns in returns_of(last[0]).items():
        assert returns[-1] == pytest.approx(earned()[place], abs=1e-5), "nothing comes after the last token"

    async def go_on(critic: CriticGroup) -> dict[str, float]:
        await critic.ranks.restore(tmp_path / "cut")
        _, metrics = await step(critic, 30)
        return metrics

    again = with_critic(settings, go_on)
    for name in ("value/loss", "value/grad_norm", "value/explained_variance"):
        assert again[name] == after[name], name


@pytest.mark.cluster
@ONLY_PROVE
@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(2, 1), (2, 3)])
def test_a_critic_learns_the_same_on_any_ranks(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int
) -> None:
    """Tokens that are too old are not learned from, and the tokens before them are."""

    async def learn(critic: CriticGroup) -> list[dict[str, float]]:
        measured = [(await step(critic, version, oldest_version=1))[1] for version in range(2)]
        await critic.ranks.save(tmp_path / f"of {len(critic.ranks.ranks)}")
        return measured

    one = with_critic(settings_of(tiny_models["untied"], tmp_path, 1, 0, "float32"), learn)
    many = with_critic(settings_of(tiny_models["untied"], tmp_path, num_ranks, zero_stage, "float32"), learn)
    for alone, shared in zip(one, many, strict=True):
        assert shared["value/loss"] == pytest.approx(alone["value/loss"], rel=1e-4)
        assert shared["value/grad_norm"] == pytest.approx(alone["value/grad_norm"], rel=1e-3)
        assert shared["value/mean"] == pytest.approx(alone["value/mean"], rel=1e-3, abs=1e-5)
    weights = [load_file(tmp_path / f"of {number}" / "model.safetensors") for number in (1, num_ranks)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        # AdamW's first steps are as large for a rounding as for a gradient, where there is none.
        assert (weight - weights[1][name]).abs().mean() < 1e-4, name
