"""A model whose head scores gives what its full logits give, scaled or not; one that caps them is left alone."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.head import ScoringHead, put_scoring_head, scoring_head
from actors.model.lora import adapt
from actors.recipe.policy import LoraConfig
from algorithms.packed import PackedRow, pack_row
from algorithms.types import Rollout
from tests.actors.model.test_scores import shared_prompts

SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "untied": LlamaConfig(**SIZES),
    "tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "biases in the layers": Qwen2Config(**SIZES),
    "experts": Qwen3MoeConfig(**SIZES, **EXPERTS),
    "scaled": CohereConfig(**SIZES, logit_scale=0.0625),
    "scaled oddly": CohereConfig(**SIZES, logit_scale=3.3),
    "divided": GraniteConfig(**SIZES, logits_scaling=6.0),
}


def row() -> PackedRow:
    random = np.random.default_rng(1)
    made = []
    for prompt, completion in ((4, 9), (1, 1), (7, 13)):
        total = prompt + completion
        tokens = random.integers(3, 400, total).astype(np.int32)
        made.append(Rollout(tokens, np.arange(total) >= prompt, np.zeros(total, np.float32), (), "stop"))
    return pack_row(made, [0.0] * len(made), pad_id=0)


def models(config: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights twice."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    return plain, copy.deepcopy(plain)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_every_gradient_are_those_of_full_logits(name: str) -> None:
    plain, scoring = models(CONFIGS[name])
    assert put_scoring_head(scoring)
    upstream = torch.randn(len(row().targets_N))
    results = []
    for model in (plain, scoring):
        logprobs_N, entropy_N = row_logprobs(model, row(), 0.7)
        (logprobs_N * upstream + entropy_N * upstream.flip(0)).sum().backward()
        results.append((logprobs_N.detach(), entropy_N.detach()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    wanted, given = dict(plain.named_parameters()), dict(scoring.named_parameters())
    assert wanted.keys() == given.keys()
    for key, parameter in wanted.items():
        torch.testing.assert_close(given[key].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_are_computed_again_change_no_value_and_no_gradient(name: str) -> None:
    """As the policy trains with gradient_checkpointing: a scoring head, and a prompt that the row holds once."""
    kept, again = models(CONFIGS[name])
    calls: list[int] = []
    results = []
    shared = pack_row(shared_prompts(), [0.0] * 8, pad_id=0)
    assert sum(shared.shared_S) > 0
    upstream_N = torch.linspace(-1.0, 1.0, len(shared.targets_N))
    for model in (kept, again):
        assert put_scoring_head(model)
        calls.append(0)
        watched = model.model.layers[0].self_attn
        watched.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        if model is again:
            model.gradient_checkpointing_enable()
        model.train()
        logprobs_N, entropy_N = row_logprobs(model, shared, 0.7)
        (logprobs_N * upstream_N + entropy_N * upstream_N.flip(0)).sum().backward()
        results.append((logprobs_N.detach(), entropy_N.detach()))
    assert calls == [1, 2], "the backward pass computes the layer once more"
    assert results[0][0].std() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    wanted = dict(kept.named_parameters())
    for key, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-5, atol=1e-6, msg=key)


def test_outside_of_scoring_the_model_is_what_it_was() -> None:
    plain, scoring = models(CONFIGS["tied"])
    put_scoring_head(scoring)
    for model in (plain, scoring):
        model.set_attn_implementation("sdpa")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(plain(ids).logits, scoring(ids).logits)
    assert scoring.get_output_embeddings().weight is scoring.get_input_embeddings().weight
    assert plain.state_dict().keys() == scoring.state_dict().keys()


def test_adapters_leave_the_head_alone_and_it_gets_no_gradient() -> None:
    plain, scoring = models(CONFIGS["untied"])
    put_scoring_head(scoring)
    results = []
    for model in (plain, scoring):
        torch.manual_seed(1)
        adapt(model, LoraConfig())
        row_logprobs(model, row(), 1.0)[0].sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert isinstance(scoring_head(scoring), ScoringHead)
    assert results[0].keys() == results[1].keys()
    assert all("lora" in name for name in results[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_model_that_caps_its_logits_makes_them_in_full() -> None:
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=5.0)
    plain, other = models(config)
    assert not put_scoring_head(other)
    assert scoring_head(other) is None
    with torch.no_grad():
        assert torch.equal(row_logprobs(other, row(), 0.7)[0], row_logprobs(plain, row(), 0.7)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "factor"), [("tied", 1.0), ("scaled oddly", 3.3), ("divided", 1 / 6)])
def test_the_factor_behind_the_head_is_found_exactly(name: str, factor: float, dtype: torch.dtype) -> None:
    _, model = models(CONFIGS[name])
    model.to(dtype)
    assert put_scoring_head(model)
    head = scoring_head(model)
    assert head is not None
    assert head.behind == pytest.approx(factor, rel=1e-15)


def test_a_factor_that_turns_the_order_of_tokens_around_is_none() -> None:
    _, model = models(CohereConfig(**SIZES, logit_scale=-0.5))
    assert not put_scoring_head(model)


def test_a_head_of_another_kind_is_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    _, model = models(CONFIGS["untied"])
    model.set_output_embeddings(Scaled(32, 400, bias=False))
    assert not put_scoring_head(model)
    assert type(model.get_output_embeddings()) is Scaled


def test_a_row_without_rollouts_still_has_a_gradient() -> None:
    _, model = models(CONFIGS["untied"])
    assert put_scoring_head(model)
    logprobs_N, _ = row_logprobs(model, pack_row([], [], pad_id=0), 1.0)
    assert logprobs_N.shape == (0,)
    (logprobs_N.sum() * 0).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
