"""With adapters nothing but adapters travels, and policy and replica agree as they do on whole models."""

import asyncio
from pathlib import Path
from typing import Any

import peft
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from actors.errors import RunError
from actors.model.lora import adapt, merged, sources
from actors.policy_group import PolicyGroup
from actors.recipe.policy import LoraConfig
from algorithms.types import Prompt, Rollout, ScoredGroup, Update
from tests.actors.test_policy import (
    batch,
    check_is_a_model,
    rollouts,
    settings_of,
    train,
    train_plainly,
    with_policy,
)
from tests.actors.test_publication import AGREEMENT, PROBE, Bench, one_step
from tests.prove import ONLY_PROVE

LORA = LoraConfig(r=4, lora_alpha=8)
NUM_BYTES = 2 * LORA.r * (4 * (64 + 64) + 3 * (64 + 256)) * 4
"""Of an adapter of the tiny models in float32: two layers of seven matrices."""
SOME = LoraConfig(r=3, lora_alpha=5, target_modules=("v_proj", "down_proj"))
NUM_SOME_BYTES = 2 * SOME.r * ((64 + 64) + (256 + 64)) * 4


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "zero_stage", "lora", "num_bytes", "sync"),
    [
        pytest.param("tied", 1, LORA, NUM_BYTES, {"staging": "none"}, marks=ONLY_PROVE, id="not-staged"),
        pytest.param("untied", 3, SOME, NUM_SOME_BYTES, {"delta": True}, marks=ONLY_PROVE, id="delta"),
    ],
)
def test_adapters_travel_and_the_replica_computes_what_the_policy_computes(
    local_ray: None,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    name: str,
    zero_stage: int,
    lora: LoraConfig,
    num_bytes: int,
    sync: dict[str, Any],
) -> None:
    path = tiny_models[name]
    bench = Bench(path, path, zero_stage, "keep", lora, **sync)

    differences: list[float] = []
    sent: list[float] = []
    checksums: list[str] = []

    async def publish(version: int) -> None:
        await bench.publisher.publish(version)
        differences.append(await bench.difference())
        sent.append(bench.publisher.metrics["sync/bytes"])
        checksums.append(await bench.replica.checksum.remote())

    async def run() -> None:
        await bench.start()
        await publish(0)
        for version in range(3):
            await bench.group.step(*one_step(version))
            assert await bench.difference() > 10 * AGREEMENT, "the step must move the policy for the check to mean much"
            await publish(version + 1)
        await bench.group.save(tmp_path)

    try:
        asyncio.run(run())
    finally:
        bench.kill()
    assert max(differences) < AGREEMENT
    assert len(set(checksums)) == 4, "the adapter is in the replica's checksum"
    if "delta" in sync:
        assert sent[1] < num_bytes < max(sent) < num_bytes + 100, "the first step moves B alone; frames come on top"
    else:
        assert set(sent) == {num_bytes}
    check_saved(path, tmp_path, lora)


def check_saved(base: Path, saved: Path, lora: LoraConfig) -> None:
    """The folder is a plain model, and the adapter in it makes that model of the base; nothing else has moved."""
    before, after = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base, saved))
    for name, parameter in before.named_parameters():
        targets = ("_proj",) if lora.target_modules == "all-linear" else lora.target_modules
        adapted = any(target in name for target in targets)
        assert torch.equal(parameter, after.get_parameter(name)) != adapted, name
    ids = torch.tensor([PROBE])
    read = peft.PeftModel.from_pretrained(before, saved / "adapter").eval()
    assert torch.allclose(read(ids).logits, after(ids).logits, atol=1e-4)


@ONLY_PROVE
@pytest.mark.cluster
def test_tokens_carry_the_adapter_that_sampled_them(local_ray: None, tiny_models: dict[str, Path]) -> None:
    """Adapters are swapped under running requests, which go on with them; every token knows its own."""
    bench = Bench(tiny_models["untied"], tiny_models["untied"], 1, "keep", LORA)

    async def run() -> list[ScoredGroup]:
        await bench.start()
        await bench.publisher.publish(0)
        await bench.replica.fill.remote(Prompt(100, 0, tuple(PROBE), "", {}), 0)[1]
        sampling = asyncio.gather(
            *(bench.replica.fill.remote(Prompt(index, 0, tuple(PROBE), "", {}), 0)[1] for index in range(8))
        )
        version = 0
        while version < 30 and not sampling.done():
            await bench.group.step(*one_step(version))
            version += 1
            await bench.publisher.publish(version)
        late = await bench.replica.fill.remote(Prompt(101, 0, tuple(PROBE), "", {}), 0)[1]
        return [*await sampling, late]

    try:
        groups = asyncio.run(run())
        late = [recorded_wrong(bench, rollout) for rollout in groups[-1].group.rollouts]
    finally:
        bench.kill()
    spans = [rollout.spans for scored in groups for rollout in scored.group.rollouts]
    assert any(len(of_rollout) > 1 for of_rollout in spans), "some went on under another adapter"
    for of_rollout in spans:
        assert [span.version for span in of_rollout] == sorted({span.version for span in of_rollout})
    assert {span.version for r in groups[-1].group.rollouts for span in r.spans} == {bench.publisher.committed}
    assert max(late) < AGREEMENT, "what was recorded at sampling is what the policy of that version computes"


def recorded_wrong(bench: Bench, rollout: Rollout) -> float:
    """Largest difference of a recorded log-probability from what the policy computes now."""
    ours = torch.tensor(ray.get(bench.rank.logprobs.remote([rollout]))[0])
    return float((ours - torch.from_numpy(rollout.logprobs_T[rollout.loss_mask_T])).abs().max())


@pytest.fixture(scope="module")
def expected(local_ray: None, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One rank, no ZeRO, everything in one micro-batch."""
    return train(tiny_models["untied"], tmp_path_factory.mktemp("plain"), 1, 0, 10_000, lora=LORA)


@pytest.mark.cluster
def test_the_step_is_plain_adamw_on_the_adapters(expected, tiny_models: dict[str, Path]) -> None:
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_models["untied"], dtype=torch.float32)
    adapt(model, LORA)
    _, norms = train_plainly(tiny_models["untied"], model=model)
    weights, updates = expected
    assert [update.metrics["grad_norm"] for update in updates] == pytest.approx(norms, rel=1e-4)
    parameters = dict(model.named_parameters())
    for name, parts in sources(parameters).items():
        plain = merged([parameters[part] for part in parts], LORA.lora_alpha / LORA.r)
        assert torch.allclose(weights[name], plain, atol=2e-6), name
        assert torch.equal(weights[name], parameters[parts[0]]) != ("_proj" in name), name


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "checkpointing"), [pytest.param(2, 0, False, marks=ONLY_PROVE), (2, 3, True)]
)
def test_ranks_stages_and_checkpoints_do_not_matter(
    expected, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int, checkpointing: bool
) -> None:
    weights, updates = train(
        tiny_models["untied"], tmp_path, num_ranks, zero_stage, 16, lora=LORA, gradient_checkpointing=checkpointing
    )
    for update, other in zip(updates, expected[1], strict=True):
        for metric in ("loss", "grad_norm", "entropy"):
            assert update.metrics[metric] == pytest.approx(other.metrics[metric], rel=1e-4, abs=1e-6), metric
    for name, tensor in expected[0].items():
        assert torch.allclose(weights[name], tensor, atol=5e-6), name


@ONLY_PROVE
@pytest.mark.cluster
def test_bfloat16_takes_the_same_step_to_its_precision(expected, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    weights, updates = train(tiny_models["untied"], tmp_path, 2, 2, 20, dtype="bfloat16", lora=LORA)
    for update, other in zip(updates, expected[1], strict=True):
        for metric in ("loss", "grad_norm", "entropy"):
            assert update.metrics[metric] == pytest.approx(other.metrics[metric], rel=0.05, abs=0.02), metric
    for name, tensor in expected[0].items():
        assert weights[name].dtype == torch.bfloat16
        assert torch.allclose(weights[name].float(), tensor, atol=5e-3, rtol=1e-2), name


@pytest.mark.cluster
def test_a_policy_goes_on_from_a_checkpoint_of_its_adapters(
    expected, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """Written by two ranks under ZeRO-3, read by one under ZeRO-1; the model below is in no checkpoint."""
    path = tiny_models["untied"]

    async def first(group: PolicyGroup) -> list[list[float]]:
        await group.step(*batch(2, 20, 0, 0))
        logprobs = await asyncio.gather(*(rank.logprobs.remote(rollouts()) for rank in group.ranks))
        await group.snapshot()
        await group.write_snapshot(tmp_path, 60.0)
        return logprobs[0]

    async def second(group: PolicyGroup) -> Update:
        await group.restore(tmp_path)
        update = await group.step(*batch(1, 20, 1, 0))
        await group.save(tmp_path / "after")
        return update

    logprobs = with_policy(settings_of(path, tmp_path, 2, 3, "float32", LORA), first)
    files = tmp_path / "model"
    assert sum(tensor.nbytes for tensor in load_file(files / "adapter_model.safetensors").values()) == NUM_BYTES
    check_is_a_model(files, logprobs, tolerance=1e-4)  # transformers finds the base by the adapter's config
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([PROBE])
    read, named = peft.PeftModel.from_pretrained(base, files).eval(), AutoModelForCausalLM.from_pretrained(files)
    assert torch.equal(read(ids).logits, named(ids).logits)
    update = with_policy(settings_of(path, tmp_path, 1, 1, "float32", LORA), second)
    assert update.metrics["loss"] == pytest.approx(expected[1][1].metrics["loss"], rel=1e-4)
    weights = load_file(tmp_path / "after" / "model.safetensors")
    for name, tensor in expected[0].items():
        assert torch.allclose(weights[name], tensor, atol=5e-6), name
    with pytest.raises(RunError, match=r"the adapter was trained on other weights than those of .*/other"):
        with_policy(settings_of(tiny_models["other"], tmp_path, 1, 1, "float32", LORA), second)
