"""The learning rate can be lowered beside its schedule, on all ranks, and a checkpoint knows it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.policy_group import PolicyGroup
from tests.actors.test_policy import batch, settings_of, with_policy
from tests.prove import ONLY_PROVE


def halve_the_schedule(path: Path) -> None:
    """What a policy would have written whose recipe says half the learning rate."""
    facts = json.loads(path.read_text())
    assert facts["learning_rate_factor"] == 0.5
    facts["learning_rate_factor"] = 1.0
    for name in ("base_lrs", "_last_lr"):
        facts["schedule"][name] = [rate / 2 for rate in facts["schedule"][name]]
    path.write_text(json.dumps(facts))


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 1), (1, 0)), pytest.param((1, 0), (2, 3), marks=ONLY_PROVE), pytest.param((2, 2), (2, 2), marks=ONLY_PROVE)],
)
def test_a_lowered_learning_rate_is_the_schedules_times_the_factor_from_the_next_step_on(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """And the step is the one that a policy would make whose schedule is half of it."""
    path = tiny_models["untied"]

    def linear(num_ranks: int, zero_stage: int, learning_rate: float = 1e-3):
        settings = settings_of(path, tmp_path, num_ranks, zero_stage, "float32")
        optimizer = settings.optimizer.model_copy(
            update={"lr_scheduler_type": "linear", "learning_rate": learning_rate, "weight_decay": 0.0}
        )
        return replace(settings, num_steps=4, optimizer=optimizer)

    async def first(group: PolicyGroup) -> list[float]:
        update = await group.step(*batch(before[0], 20, 0, 0))
        assert update.metrics["policy/learning_rate_factor"] == 1.0
        await group.scale_learning_rate(0.5)
        lower = await group.step(*batch(before[0], 20, 1, 0))
        assert lower.metrics["policy/learning_rate_factor"] == 0.5
        await group.snapshot()
        await group.write_snapshot(tmp_path, 60.0)
        return [u.metrics["learning_rate"] for u in (update, lower)]

    async def second(group: PolicyGroup) -> list[float]:
        await group.restore(tmp_path)
        update = await group.step(*batch(after[0], 20, 2, 0))
        await group.save(tmp_path / "lowered")
        return [update.metrics["learning_rate"]]

    async def half(group: PolicyGroup) -> None:
        await group.restore(tmp_path)
        await group.step(*batch(after[0], 20, 2, 0))
        await group.save(tmp_path / "half")

    rates = with_policy(linear(*before), first) + with_policy(linear(*after), second)
    assert rates == pytest.approx([1e-3, 0.5 * 0.75e-3, 0.5 * 0.5e-3])
    halve_the_schedule(tmp_path / "policy.json")
    with_policy(linear(*after), half)
    lowered, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("lowered", "half"))
    for name, tensor in expected.items():
        assert torch.equal(lowered[name], tensor), name
