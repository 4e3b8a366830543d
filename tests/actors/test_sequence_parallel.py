"""Ranks that share out each row take the step that one rank takes, on any ZeRO stage, with adapters and critics too."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from actors.errors import RunError
from actors.policy_group import PolicyGroup
from actors.recipe.policy import LoraConfig
from algorithms.types import Update
from tests.actors.test_critic import returns_of, with_critic
from tests.actors.test_critic import step as critic_step
from tests.actors.test_policy import batch, rollouts, settings_of, train, train_plainly, with_policy
from tests.prove import ONLY_PROVE

SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four attention heads and two heads of keys and values, on disk."""
    folder = tmp_path_factory.mktemp("four-heads")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3Config(**SIZES)).save_pretrained(folder)
    return folder


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("num_ranks", "team_size", "zero_stage", "max_tokens"),
    [(2, 2, 3, 30)]
    + [
        pytest.param(*case, marks=ONLY_PROVE)
        for case in ((2, 2, 0, 10_000), (2, 2, 1, 20), (4, 2, 2, 20), (4, 4, 3, 30))
    ],
)
def test_a_team_takes_the_step_of_plain_adamw(
    local_ray: None,
    four_heads: Path,
    tmp_path: Path,
    num_ranks: int,
    team_size: int,
    zero_stage: int,
    max_tokens: int,
) -> None:
    weights, updates = train(four_heads, tmp_path, num_ranks, zero_stage, max_tokens, team_size=team_size)
    model, norms = train_plainly(four_heads)
    assert [update.metrics["grad_norm"] for update in updates] == pytest.approx(norms, rel=1e-4)
    for name, parameter in model.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=5e-6), name


@ONLY_PROVE
@pytest.mark.cluster
def test_metrics_and_log_probabilities_are_those_of_one_rank(local_ray: None, four_heads: Path, tmp_path: Path) -> None:
    """Half of the tokens are stale, and layers are computed again in the backward pass."""
    found = []
    for num_ranks in (1, 2):
        settings = settings_of(four_heads, tmp_path, num_ranks, 2, "float32", None, True, num_ranks)

        async def run(group: PolicyGroup) -> tuple[list[Update], list[list[float]], dict[tuple[int, int], float]]:
            updates = [await group.step(*batch(1, 30, step, 1)) for step in range(2)]
            of_each = await group.numbers(*batch(1, 30, 2, 1))
            logprobs = await asyncio.gather(*(rank.logprobs.remote(rollouts()) for rank in group.ranks))
            return updates, logprobs[-1], of_each

        found.append(with_policy(settings, run))
    (alone, alone_logprobs, alone_numbers), (together, logprobs, numbers) = found
    timings = ("time/policy_step_s", "policy_tok_per_s")
    for mine, its in zip(together, alone, strict=True):
        assert mine.metrics.keys() == its.metrics.keys()
        for name in mine.metrics.keys() - set(timings):
            assert mine.metrics[name] == pytest.approx(its.metrics[name], rel=1e-4, abs=1e-6), name
    for mine, its in zip(logprobs, alone_logprobs, strict=True):
        assert mine == pytest.approx(its, abs=1e-5)
    assert numbers == pytest.approx(alone_numbers, abs=1e-4)


@ONLY_PROVE
@pytest.mark.cluster
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_team_trains_adapters_against_the_model_below(
    local_ray: None, four_heads: Path, tmp_path: Path, zero_stage: int
) -> None:
    found = []
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        lora = LoraConfig(r=4, lora_alpha=8)
        settings = settings_of(four_heads, folder, num_ranks, zero_stage, "float32", lora, False, num_ranks)
        grpo = settings.objective.grpo
        assert grpo is not None
        objective = replace(settings.objective, grpo=grpo.model_copy(update={"beta": 0.1}), reference_below=True)
        settings = replace(settings, objective=objective)

        async def run(group: PolicyGroup, folder: Path = folder) -> tuple[list[Update], Any]:
            updates = [await group.step(*batch(1, 30, step, 0)) for step in range(3)]
            sums = await group.references(*batch(1, 30, 3, 0))
            await group.save(folder)
            return updates, sums

        found.append(with_policy(settings, run))
    (alone, alone_sums), (together, sums) = found
    for mine, its in zip(together, alone, strict=True):
        for name in ("loss", "grad_norm", "kl"):
            assert mine.metrics[name] == pytest.approx(its.metrics[name], rel=1e-3, abs=1e-6), name
    assert together[-1].metrics["kl"] > 1e-6, "the adapter must have moved for this to mean much"
    assert sums.keys() == alone_sums.keys()
    for place, mine in sums.items():
        assert mine.logprob == pytest.approx(alone_sums[place].logprob, abs=1e-4)
    from safetensors.torch import load_file

    weights, alone_weights = (load_file(tmp_path / n / "model.safetensors") for n in ("2", "1"))
    assert all(torch.allclose(weights[name], alone_weights[name], atol=1e-5) for name in weights)


@ONLY_PROVE
@pytest.mark.cluster
def test_a_team_of_critics_says_what_one_says(local_ray: None, four_heads: Path, tmp_path: Path) -> None:
    found = []
    for num_ranks in (1, 2):
        settings = settings_of(four_heads, tmp_path, num_ranks, 1, "float32", team_size=num_ranks)
        found.append(with_critic(settings, lambda critic: critic_step(critic, 0)))
    (alone, alone_metrics), (together, metrics) = found
    assert metrics["value/loss"] == pytest.approx(alone_metrics["value/loss"], rel=1e-4)
    assert metrics["value/grad_norm"] == pytest.approx(alone_metrics["value/grad_norm"], rel=1e-4)
    returns, alone_returns = returns_of(together), returns_of(alone)
    assert returns.keys() == alone_returns.keys()
    assert all(returns[place] == pytest.approx(alone_returns[place], abs=1e-4) for place in returns)


@ONLY_PROVE
@pytest.mark.cluster
def test_a_model_whose_heads_cannot_be_shared_out_ends_the_start(
    local_ray: None, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    settings = settings_of(tiny_models["untied"], tmp_path, 2, 1, "float32", team_size=2)

    async def run(group: PolicyGroup) -> None:
        raise AssertionError("it must not have started")

    with pytest.raises(RunError, match=r"policy\.sequence_parallel_size: 2 ranks cannot share out the model's 1 att"):
        with_policy(settings, run)
