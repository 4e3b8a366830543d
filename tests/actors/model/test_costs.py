"""What a model's config says of its work agrees with the operations that a forward pass makes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config, Qwen3MoeConfig

from actors.model import segments
from actors.model.costs import costs_of
from actors.model.forward import PACKED_ATTENTION, row_logprobs
from algorithms.packed import pack_row
from algorithms.types import Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen3Config(**SIZES, tie_word_embeddings=True)])
def test_the_parts_are_those_of_a_counted_pass(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    costs = costs_of(model)

    def flops(num_tokens: int, num_loss_tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, num_tokens, dtype=torch.long), logits_to_keep=torch.arange(num_loss_tokens))
        return counter.get_total_flops()

    # Eager attention multiplies what causality hides as well: twice what a kernel does that leaves it out.
    rotary = flops(100, 0) / 2 - flops(50, 0)  # = attention of 100 tokens / 4, all else is in proportion
    unit = (flops(100, 0) - 4 * rotary) / 100
    assert (flops(100, 50) - flops(100, 0)) / (50 * unit) == pytest.approx(costs.head, rel=0.02)
    assert 4 * rotary / 2 / unit == pytest.approx(costs.of(100, 0) - 100, rel=0.02)


@pytest.mark.parametrize("num_prompt", [30, 200])
def test_a_prompt_that_is_shared_saves_the_layers_and_no_attention(
    num_prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In grids, as on GPUs; the kernel is one whose multiplications are counted."""
    monkeypatch.setattr(segments, "ONE_BY_ONE", ())
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=PACKED_ATTENTION).eval()

    def flops(first: list[int]) -> int:
        total = num_prompt + 20
        tokens = [np.append(place, np.arange(1, total)).astype(np.int32) for place in first]
        mask, nothing = np.arange(total) >= num_prompt, np.zeros(total, np.float32)
        row = pack_row([Rollout(ids, mask, nothing, (), "stop") for ids in tokens], [0.0] * len(first), pad_id=0)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            row_logprobs(model, row, 1.0)
        return counter.get_total_flops()

    layers = 2 * sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim > 1)
    saved = (flops([0, 1, 2, 3]) - flops([0, 0, 0, 0])) / layers
    assert saved == pytest.approx(3 * costs_of(model).shared(num_prompt), rel=0.02)


def test_experts_count_by_the_share_that_a_token_is_sent_to() -> None:
    sizes = SIZES | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    with torch.device("meta"):
        sparse = costs_of(AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes)))
        dense = costs_of(AutoModelForCausalLM.from_config(Qwen3Config(**SIZES | {"intermediate_size": 192})))
    assert sparse.even_length == pytest.approx(dense.even_length, rel=0.02)  # but for the router


def test_a_sliding_window_is_not_quadratic() -> None:
    config = Qwen3Config(**SIZES, layer_types=["full_attention", "sliding_attention", "sliding_attention"])
    with torch.device("meta"):
        some, all_full = (costs_of(AutoModelForCausalLM.from_config(each)) for each in (config, Qwen3Config(**SIZES)))
    assert some.even_length == pytest.approx(3 * all_full.even_length)


def test_a_window_in_every_layer_is_not_quadratic() -> None:
    with torch.device("meta"):
        costs = costs_of(AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=8)))
    assert costs.of(100, 0) == 100
