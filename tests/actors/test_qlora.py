"""DeepSpeed ranks train adapters over four bits as over the weights that these stand for, and keep and save them."""

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.errors import RunError
from actors.model.load import load_causal_lm
from actors.model.lora import ADAPTER_FOLDER
from actors.policy_group import PolicyGroup
from actors.recipe.policy import LoraConfig
from algorithms.types import Update
from tests.actors.model.four_bits import check_merged, of_four_bits
from tests.actors.test_policy import batch, rollouts, settings_of, train, with_policy
from tests.prove import ONLY_PROVE

pytestmark = [pytest.mark.cluster, ONLY_PROVE]
LORA = LoraConfig(r=4, lora_alpha=8)
QLORA = LORA.model_copy(update={"quantize": "nf4"})


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")


@pytest.mark.parametrize(("num_ranks", "zero_stage"), [(1, 1), (2, 2)])
def test_the_step_is_that_on_the_weights_that_four_bits_stand_for(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int
) -> None:
    """Saved it is over the whole weights all the same."""
    path, folders = tiny_models["untied"], [tmp_path / name for name in ("held", "plain", "four")]
    held = load_causal_lm(str(path), None, False, "bfloat16")
    for name, weight in of_four_bits(path).items():
        held.get_parameter(name).data.copy_(weight)
    held.save_pretrained(folders[0])
    for folder in folders[1:]:
        folder.mkdir()
    _, expected = train(folders[0], folders[1], num_ranks, zero_stage, 20, dtype="bfloat16", lora=LORA)
    _, updates = train(path, folders[2], num_ranks, zero_stage, 20, dtype="bfloat16", lora=QLORA)
    for update, other in zip(updates, expected, strict=True):
        for metric in ("loss", "grad_norm", "entropy"):
            assert update.metrics[metric] == pytest.approx(other.metrics[metric], rel=1e-3, abs=1e-5), metric
    ours, theirs = adapter_in(folders[2]), adapter_in(folders[1])
    assert any(bool(tensor.any()) for name, tensor in ours.items() if "lora_B" in name), "it must have moved"
    assert all(torch.allclose(tensor, theirs[name], atol=1e-4, rtol=1e-2) for name, tensor in ours.items())
    check_merged(folders[2], path, QLORA)


def test_a_policy_goes_on_from_a_checkpoint_of_its_adapters(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Written by two ranks, read by one, and by none that holds another model below."""
    path = tiny_models["untied"]
    (tmp_path / "whole").mkdir()
    _, expected = train(path, tmp_path / "whole", 1, 1, 20, dtype="bfloat16", lora=QLORA)

    async def first(group: PolicyGroup) -> list[list[float]]:
        await group.step(*batch(2, 20, 0, 0))
        said = await asyncio.gather(*(rank.logprobs.remote(rollouts()) for rank in group.ranks))
        await group.snapshot()
        await group.write_snapshot(tmp_path, 60.0)
        assert said[0] == said[1]
        return said[0]

    async def second(group: PolicyGroup) -> tuple[list[list[float]], Update]:
        await group.restore(tmp_path)
        said = await group.ranks[0].logprobs.remote(rollouts())
        return said, await group.step(*batch(1, 20, 1, 0))

    before = with_policy(settings_of(path, tmp_path, 2, 2, "bfloat16", QLORA), first)
    after, update = with_policy(settings_of(path, tmp_path, 1, 1, "bfloat16", QLORA), second)
    assert after == before
    assert update.metrics["loss"] == pytest.approx(expected[1].metrics["loss"], rel=0.05)
    with pytest.raises(RunError, match=r"the adapter was trained on other weights than those of .*/other"):
        with_policy(settings_of(tiny_models["other"], tmp_path, 1, 1, "bfloat16", QLORA), second)
