"""A policy step is the gradient of the global batch, whatever the ranks, the ZeRO stage or the micro-batches."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from actors.model.load import Dtype
from actors.objective import Objective
from actors.policy import policy_actor
from actors.policy_calls import PolicySettings
from actors.policy_group import PolicyGroup
from actors.recipe.policy import LoraConfig, PolicyConfig
from algorithms.config import GrpoConfig, OptimizerConfig
from algorithms.packing import pack
from algorithms.types import Batch, Group, MicroBatch, Prompt, Rollout, Sample, Update, VersionSpan
from tests.prove import ONLY_PROVE

Answer = TypeVar("Answer")

LENGTHS = [(5, 9), (5, 2), (8, 2), (2, 12), (6, 6), (4, 1), (7, 3), (2, 2)]  # prompt and completion tokens
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.05)


def spans(prompt: int, completion: int) -> tuple[VersionSpan, ...]:
    """The first half of the completion is of version 0, the second of 1; a single token is of version 0."""
    middle, total = prompt + (completion + 1) // 2, prompt + completion
    halves = (VersionSpan(0, prompt, middle), VersionSpan(1, middle, total))
    return tuple(span for span in halves if span.stop > span.start)


def rollouts() -> list[Rollout]:
    random = np.random.default_rng(0)
    made = []
    for prompt, completion in LENGTHS:
        total = prompt + completion
        mask = np.arange(total) >= prompt
        made.append(
            Rollout(
                token_ids_T=random.integers(4, 250, total).astype(np.int32),
                loss_mask_T=mask,
                logprobs_T=np.where(mask, -5.5 + 0.3 * random.standard_normal(total), 0).astype(np.float32),
                spans=spans(prompt, completion),
                finish_reason="stop",
            )
        )
    made[1].token_ids_T[:5] = made[0].token_ids_T[:5]  # one prompt, which a pass that has both computes once
    return made


def batch(num_ranks: int, max_tokens: int, version: int, oldest_version: int) -> tuple[Batch, list[Group]]:
    made = rollouts()
    samples = [Sample(index, 0, r.num_tokens, (-1.0) ** index * (1 + index / 4)) for index, r in enumerate(made)]
    packed = pack([r.num_tokens for r in made], num_ranks, max_tokens)
    ranks = tuple(tuple(MicroBatch(tuple(samples[i] for i in micro)) for micro in rank) for rank in packed)
    groups = [Group(Prompt(i, 0, (), "", {}), (rollout,), 0, 0) for i, rollout in enumerate(made)]
    return Batch(version, ranks, len(made), sum(r.num_loss_tokens for r in made), oldest_version), groups


def train(
    path: Path,
    folder: Path,
    num_ranks: int,
    zero_stage: int,
    max_tokens: int,
    dtype: Dtype = "float32",
    oldest_version: int = 0,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
) -> tuple[dict[str, torch.Tensor], list[Update]]:
    """Weights after two steps on the same batch, and the updates."""
    from safetensors.torch import load_file

    settings = settings_of(path, folder, num_ranks, zero_stage, dtype, lora, gradient_checkpointing)

    async def run(group: PolicyGroup) -> list[Update]:
        updates = [await group.step(*batch(num_ranks, max_tokens, step, oldest_version)) for step in range(2)]
        await group.save(folder)
        return updates

    updates = with_policy(settings, run)
    return load_file(folder / "model.safetensors"), updates


def settings_of(
    path: Path,
    folder: Path,
    num_ranks: int,
    zero_stage: int,
    dtype: Dtype,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
) -> PolicySettings:
    return PolicySettings(
        model_path=str(path),
        revision=None,
        trust_remote_code=False,
        num_ranks=num_ranks,
        use_gpu=False,
        seed=0,
        num_steps=2,
        policy=PolicyConfig(
            zero_stage=zero_stage, dtype=dtype, lora=lora, gradient_checkpointing=gradient_checkpointing
        ),
        optimizer=OPTIMIZER,
        objective=Objective(GrpoConfig(loss_type="grpo"), 1.0, 16),
        run_dir=str(folder),
    )


def with_policy(settings: PolicySettings, use: Callable[[PolicyGroup], Awaitable[Answer]]) -> Answer:
    """What `use` makes of a policy that has started."""
    import ray

    actor = policy_actor().options(num_cpus=0.5)
    ranks = tuple(actor.remote(rank, settings) for rank in range(settings.num_ranks))

    async def run() -> Answer:
        group = PolicyGroup(ranks, 16, 60.0)
        await group.start(120.0)
        return await use(group)

    try:
        return asyncio.run(run())
    finally:
        for rank in ranks:
            ray.kill(rank)


@pytest.fixture(scope="module")
def expected(local_ray: None, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """One rank, no ZeRO, everything in one micro-batch."""
    return train(tiny_models["untied"], tmp_path_factory.mktemp("plain"), 1, 0, 10_000)


def train_plainly(
    path: Path, oldest_version: int = 0, model: torch.nn.Module | None = None
) -> tuple[torch.nn.Module, list[float]]:
    """With torch alone: each sequence alone, the loss by hand, AdamW, clipping; the model and the gradient norms."""
    from transformers import AutoModelForCausalLM

    model = model or AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    made = rollouts()
    norms = []
    for _ in range(2):
        loss = torch.zeros(())
        for index, rollout in enumerate(made):
            ids = torch.tensor(rollout.token_ids_T[None].astype(np.int64))
            logprobs = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            logprobs = logprobs[torch.from_numpy(rollout.loss_mask_T[1:])]
            sampled = torch.from_numpy(rollout.logprobs_T[rollout.loss_mask_T])
            fresh = torch.ones(len(sampled), dtype=torch.bool)
            if oldest_version == 1:
                fresh[: (len(fresh) + 1) // 2] = False
            weight = (logprobs.detach() - sampled)[fresh].sum().exp()
            weight = torch.where(weight > 3.0, torch.zeros_like(weight), weight)
            advantage = (-1.0) ** index * (1 + index / 4)
            loss = loss - ((logprobs - logprobs.detach()).exp() * advantage * weight * fresh).mean() / len(made)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm).item())
        optimizer.step()
    return model, norms


@pytest.mark.cluster
def test_the_step_is_plain_adamw(expected, tiny_models: dict[str, Path]) -> None:
    model, norms = train_plainly(tiny_models["untied"])
    weights, updates = expected
    assert [u.metrics["grad_norm"] for u in updates] == pytest.approx(norms, rel=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=2e-6), name


@pytest.mark.cluster
def test_stale_tokens_leave_the_step(expected, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Half of the tokens are masked, of one sequence all; the others have the weight that they had."""
    weights, updates = train(tiny_models["untied"], tmp_path, 2, 1, 16, oldest_version=1)
    model, norms = train_plainly(tiny_models["untied"], oldest_version=1)
    measured = [update.metrics["grad_norm"] for update in updates]
    assert measured == pytest.approx(norms, rel=1e-4)
    assert measured != pytest.approx([update.metrics["grad_norm"] for update in expected[1]], rel=0.01)
    for name, parameter in model.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=5e-6), name


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "zero_stage", "max_tokens"),
    [(2, 0, 20), (2, 1, 16), (2, 3, 16)]
    + [pytest.param(*case, marks=ONLY_PROVE) for case in ((1, 1, 20), (1, 3, 30), (2, 2, 20))],
)
def test_ranks_stages_and_micro_batches_do_not_matter(
    expected, tiny_models: dict[str, Path], tmp_path: Path, num_ranks: int, zero_stage: int, max_tokens: int
) -> None:
    weights, updates = train(tiny_models["untied"], tmp_path, num_ranks, zero_stage, max_tokens)
    expected_weights, expected_updates = expected
    for update, other in zip(updates, expected_updates, strict=True):
        assert update.version == other.version
        for metric in ("loss", "grad_norm", "entropy", "sampling/importance_sampling_ratio/mean"):
            assert update.metrics[metric] == pytest.approx(other.metrics[metric], rel=1e-4, abs=1e-6), metric
    for name, tensor in expected_weights.items():
        assert torch.allclose(weights[name], tensor, atol=5e-6), name


@pytest.mark.cluster
def test_bfloat16_takes_the_same_step_to_its_precision(expected, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    weights, updates = train(tiny_models["untied"], tmp_path, 2, 2, 20, dtype="bfloat16")
    expected_weights, expected_updates = expected
    for update, other in zip(updates, expected_updates, strict=True):
        for metric in ("loss", "grad_norm", "entropy"):
            assert update.metrics[metric] == pytest.approx(other.metrics[metric], rel=0.05, abs=0.02), metric
    for name, tensor in expected_weights.items():
        assert weights[name].dtype == torch.bfloat16
        assert torch.allclose(weights[name].float(), tensor, atol=5e-3, rtol=1e-2), name


def check_is_a_model(folder: Path, logprobs: list[list[float]], tolerance: float) -> None:
    """transformers computes from the folder what the policy has computed of the rollouts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    for rollout, expected in zip(rollouts(), logprobs, strict=True):
        ids = torch.tensor(rollout.token_ids_T[None].astype(np.int64))
        with torch.no_grad():
            found = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        assert found[torch.from_numpy(rollout.loss_mask_T[1:])].tolist() == pytest.approx(expected, abs=tolerance)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        pytest.param((1, 0), (1, 0), "float32", id="same"),
        pytest.param((2, 1), (1, 3), "float32", id="fewer ranks", marks=ONLY_PROVE),
        pytest.param((1, 2), (2, 3), "bfloat16", id="more ranks"),
    ],
)
def test_a_policy_goes_on_from_its_checkpoint(
    local_ray: None,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
    dtype: Dtype,
) -> None:
    """One step, a checkpoint, another policy, one more step: as two steps without; to the bit on equal ranks."""
    path = tiny_models["tied" if before == after else "untied"]
    (tmp_path / "whole").mkdir()
    whole, updates = train(path, tmp_path / "whole", *after, 20, dtype=dtype)

    async def first(group: PolicyGroup) -> list[list[float]]:
        (tmp_path / "earlier").mkdir()
        await group.snapshot()
        await group.write_snapshot(tmp_path / "earlier", 60.0)  # whose memory the next one takes
        await group.step(*batch(before[0], 20, 0, 0))
        logprobs = await asyncio.gather(*(rank.logprobs.remote(rollouts()) for rank in group.ranks))
        await group.snapshot()
        await group.step(*batch(before[0], 20, 1, 0))  # what comes later is not in it
        await group.write_snapshot(tmp_path, 60.0)
        return logprobs[0]

    async def second(group: PolicyGroup) -> Update:
        await group.restore(tmp_path)
        update = await group.step(*batch(after[0], 20, 1, 0))
        await group.save(tmp_path / "after")
        return update

    logprobs = with_policy(settings_of(path, tmp_path, *before, dtype), first)
    check_is_a_model(tmp_path / "model", logprobs, tolerance=1e-4 if dtype == "float32" else 0.1)
    update = with_policy(settings_of(path, tmp_path, *after, dtype), second)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "after" / "model.safetensors")
    assert update.version == updates[1].version == 2
    assert update.metrics["learning_rate"] == updates[1].metrics["learning_rate"]
    for name, tensor in whole.items():
        if before == after:
            assert torch.equal(weights[name], tensor), name
        else:
            tolerance = 5e-6 if dtype == "float32" else 5e-3
            assert torch.allclose(weights[name].float(), tensor.float(), atol=tolerance, rtol=1e-2), name
    assert update.metrics["loss"] == pytest.approx(updates[1].metrics["loss"], rel=1e-4 if dtype == "float32" else 0.05)
