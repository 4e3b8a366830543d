"""What DeepSpeed ranks say without their adapter is what a reference worker says, and so is what they train on it."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

from actors.objective import Objective
from actors.policy_group import PolicyGroup
from actors.recipe.policy import LoraConfig
from actors.reference import ReferenceActor, ReferenceSettings
from algorithms.config import GrpoConfig
from algorithms.types import Group, KlSums, Update
from tests.actors.test_policy import batch, settings_of, with_policy
from tests.prove import ONLY_PROVE

LORA = LoraConfig(r=4, lora_alpha=8)
TEMPERATURE = 0.8
CONFIG = GrpoConfig(loss_type="grpo", beta=0.5)


def referred_by_a_worker(path: Path, groups: list[Group]) -> list[Group]:
    worker = ReferenceActor(ReferenceSettings(str(path), None, False, "float32", TEMPERATURE, 64, use_gpu=False))
    return [worker.score(group) for group in groups]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "zero_stage"), [(1, 1), pytest.param(2, 3, marks=ONLY_PROVE)], ids=["one-rank", "zero-3"]
)
def test_ranks_without_their_adapter_are_the_reference(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int
) -> None:
    """After steps that have moved the adapter; and steps on their own numbers are those on the worker's."""
    path = tiny_models["untied"]
    plain = settings_of(path, tmp_path, num_ranks, zero_stage, "float32", LORA)
    plain = replace(plain, optimizer=plain.optimizer.model_copy(update={"learning_rate": 1e-2}))
    made, groups = batch(num_ranks, 20, 0, 0)
    scored = referred_by_a_worker(path, groups)

    def trained(below: bool) -> tuple[list[Update], dict[tuple[int, int], tuple[float, KlSums]], Path]:
        folder = tmp_path / f"{below}"
        objective = Objective(CONFIG, TEMPERATURE, 16, reference_below=below)

        async def run(group: PolicyGroup) -> tuple[list[Update], dict[tuple[int, int], tuple[float, KlSums]]]:
            refs = [ray.put(each) for each in (groups if below else scored)]
            updates = [await group.step(replace(made, version=version), refs) for version in range(3)]
            sums = await group.references(replace(made, version=3), refs)
            await group.save(folder)
            return updates, {place: (each.logprob, each.kl) for place, each in sums.items()}

        return *with_policy(replace(plain, objective=objective), run), folder

    (updates, sums, folder), (others, expected, other) = trained(True), trained(False)
    for mine, theirs in zip(updates, others, strict=True):
        assert mine.metrics["loss"] == pytest.approx(theirs.metrics["loss"], abs=1e-5)
        assert mine.metrics["kl"] == pytest.approx(theirs.metrics["kl"], abs=1e-5)
    assert updates[2].metrics["kl"] > 1e-3, "the adapter must have moved for this to mean much"
    assert sums.keys() == expected.keys() == {(place, 0) for place in range(len(groups))}
    for place, (logprob, kl) in sums.items():
        assert logprob == pytest.approx(expected[place][0], abs=1e-4)
        assert kl.total == pytest.approx(expected[place][1].total, abs=1e-4)
        assert kl.to_go_squared == pytest.approx(expected[place][1].to_go_squared, rel=1e-4, abs=1e-4)
    from safetensors.torch import load_file

    weights, theirs_weights = (load_file(where / "model.safetensors") for where in (folder, other))
    assert all(torch.allclose(weights[name], theirs_weights[name], atol=1e-4) for name in weights)
