"""Sequences of a packed row never see each other, whatever the model's attention looks like."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from actors.model.forward import PACKED_ATTENTION, row_logprobs
from algorithms.packed import pack_row
from algorithms.types import Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "grouped heads": LlamaConfig(**SIZES),
    "normalised heads, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "window shorter than the sequences": MistralConfig(**SIZES, sliding_window=5),
    "window longer than the sequences": MistralConfig(**SIZES, sliding_window=50),
}


def rollouts() -> list[Rollout]:
    random = np.random.default_rng(1)
    made = []
    for prompt, completion in ((4, 9), (1, 1), (7, 13), (2, 3)):
        total = prompt + completion
        mask = np.arange(total) >= prompt
        tokens = random.integers(1, 97, total).astype(np.int32)
        made.append(Rollout(tokens, mask, np.zeros(total, np.float32), (), "stop"))
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_gives_what_each_sequence_gives_alone(name: str) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=PACKED_ATTENTION).eval()
    packed.load_state_dict(plain.state_dict())
    made = rollouts()
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    with torch.no_grad():
        together, entropy = row_logprobs(packed, row, temperature=0.7)
        alone = []
        for rollout in made:
            ids = torch.from_numpy(rollout.token_ids_T.astype(np.int64))[None]
            logprobs = torch.log_softmax(plain(ids).logits[0, :-1] / 0.7, -1).gather(1, ids[0, 1:, None])[:, 0]
            alone.append(logprobs[torch.from_numpy(rollout.loss_mask_T[1:])])
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert (entropy > 0).all()


def test_attention_that_cannot_be_packed_is_refused() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = Gemma2Config(**sizes, head_dim=8, attn_logit_softcapping=2.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    made = rollouts()
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    with pytest.raises(ValueError, match="soft-capped"):
        row_logprobs(model, row, temperature=1.0)


def test_a_row_without_rollouts_still_has_a_gradient() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["grouped heads"], attn_implementation=PACKED_ATTENTION)
    logprobs, _ = row_logprobs(model, pack_row([], [], pad_id=0), temperature=1.0)
    assert logprobs.shape == (0,)
    (logprobs.sum() * 0).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
