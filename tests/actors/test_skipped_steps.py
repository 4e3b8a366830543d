"""What is not finite never reaches the weights, on any rank, at any ZeRO stage; the next step is as if nothing was."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.model.load import Dtype
from actors.policy_group import PolicyGroup
from actors.policy_state import PolicyState
from algorithms.config import GrpoConfig
from algorithms.types import Batch, Group, Update
from tests.actors.test_policy import batch, settings_of, with_policy
from tests.prove import ONLY_PROVE

CASES = [(1, 0, "float32"), (2, 2, "bfloat16"), (2, 3, "float32")]
MORE = [
    (2, 0, "float32"), (2, 1, "float32"), (1, 1, "float32"), (1, 2, "float32"), (1, 3, "bfloat16"),
    (2, 1, "bfloat16"),
]  # fmt: skip
LOSSES = [
    (1, 0, "float32"), (2, 1, "float32"), (2, 2, "float32"), (2, 2, "bfloat16"),
]  # fmt: skip


def with_bad_advantage(num_ranks: int, version: int, value: float) -> tuple[Batch, list[Group]]:
    """One sample, of the last rank alone, has an advantage that no rollout can have."""
    whole, groups = batch(num_ranks, 20, version, 0)
    *others, last = whole.ranks
    micro = last[0]
    spoiled = replace(micro, samples=(replace(micro.samples[0], advantage=value), *micro.samples[1:]))
    return replace(whole, ranks=(*others, (spoiled, *last[1:]))), groups


async def state(group: PolicyGroup, folder: Path) -> dict[str, torch.Tensor]:
    """All that the next step depends on but the schedule."""
    await asyncio.to_thread(folder.mkdir)
    await group.snapshot()
    await group.write_snapshot(folder, 60.0)
    state = PolicyState.read(folder)
    return {**state.weights, **state.moments, "steps": torch.tensor(state.num_optimizer_steps)}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "dtype"), CASES + [pytest.param(*case, marks=ONLY_PROVE) for case in MORE]
)
def test_what_is_not_finite_leaves_weights_and_moments_alone(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int, dtype: Dtype
) -> None:
    settings = settings_of(tiny_models["untied"], tmp_path, num_ranks, zero_stage, dtype)

    async def run(group: PolicyGroup) -> tuple[list[Update], Update]:
        fresh = await state(group, tmp_path / "fresh")
        skips = [await group.step(*with_bad_advantage(num_ranks, 0, math.nan))]
        assert_equal(await state(group, tmp_path / "still fresh"), fresh)
        await group.step(*batch(num_ranks, 20, 1, 0))
        before = await state(group, tmp_path / "before")
        skips.append(await group.step(*with_bad_advantage(num_ranks, 2, math.inf)))
        skips.append(await group.step(*with_bad_advantage(num_ranks, 3, math.nan)))
        after = await state(group, tmp_path / "after")
        assert_equal(before, after)
        assert before["steps"] == 1
        final = await group.step(*batch(num_ranks, 20, 4, 0))
        await group.save(tmp_path / "with")
        return skips, final

    skips, final = with_policy(settings, run)
    for update in skips:
        assert update.skipped
        assert update.metrics["policy/skipped"] == 1.0
        assert all(map(math.isfinite, update.metrics.values()))
    assert not final.skipped
    assert final.version == 5

    async def without(group: PolicyGroup) -> Update:
        await group.step(*batch(num_ranks, 20, 0, 0))
        update = await group.step(*batch(num_ranks, 20, 1, 0))
        await group.save(tmp_path / "without")
        return update

    plain = with_policy(settings, without)
    assert final.metrics["grad_norm"] == plain.metrics["grad_norm"]
    assert final.metrics["loss"] == plain.metrics["loss"]
    assert_equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("with", "without")))


def with_reference(num_ranks: int, version: int, last: float) -> tuple[Batch, list[Group]]:
    """The reference gives the first rollout's last token this log-probability.

    Where it is -inf the divergence is infinite, and the gradient of that is not.
    """
    whole, groups = batch(num_ranks, 20, version, 0)
    rollouts = [group.rollouts[0] for group in groups]
    references = [rollout.logprobs_T.copy() for rollout in rollouts]
    references[0][-1] = last
    known = [replace(r, reference_logprobs_T=reference) for r, reference in zip(rollouts, references, strict=True)]
    return whole, [replace(group, rollouts=(rollout,)) for group, rollout in zip(groups, known, strict=True)]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "dtype"),
    [(2, 3, "float32"), *(pytest.param(*case, marks=ONLY_PROVE) for case in LOSSES)],
)
def test_a_loss_that_is_not_finite_counts_even_when_its_gradient_is(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int, dtype: Dtype
) -> None:
    settings = settings_of(tiny_models["untied"], tmp_path, num_ranks, zero_stage, dtype)
    grpo = GrpoConfig(loss_type="grpo", beta=0.1, use_bias_correction_kl=False)
    settings = replace(settings, objective=replace(settings.objective, grpo=grpo))

    async def run(group: PolicyGroup) -> Update:
        first = await group.step(*with_reference(num_ranks, 0, -5.0))
        assert not first.skipped
        before = await state(group, tmp_path / "before")
        update = await group.step(*with_reference(num_ranks, 1, -math.inf))
        assert_equal(await state(group, tmp_path / "after"), before)
        return update

    update = with_policy(settings, run)
    assert update.skipped
    assert "loss" not in update.metrics
