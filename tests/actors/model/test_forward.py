"""Sequences of a packed row never see each other, whatever the model's attention looks like."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from actors.model import forward, segments
from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.segments import Grids, alike, segments_of
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


def rollout(prompt: int, completion: int) -> Rollout:
    total = prompt + completion
    tokens = np.random.default_rng(total).integers(1, 97, total).astype(np.int32)
    return Rollout(tokens, np.arange(total) >= prompt, np.zeros(total, np.float32), (), "stop")


def rollouts() -> list[Rollout]:
    return [rollout(prompt, completion) for prompt, completion in ((4, 9), (1, 1), (7, 13), (2, 3))]


def group(prompt: int, completions: tuple[int, ...]) -> list[Rollout]:
    """Rollouts of one prompt."""
    made = [rollout(prompt, completion) for completion in completions]
    for each in made:
        each.token_ids_T[:prompt] = made[0].token_ids_T[:prompt]
    return made


def row_logprobs_alone(model: Any, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Of the loss tokens, from the model's own logits of the sequence."""
    ids = torch.from_numpy(rollout.token_ids_T.astype(np.int64))[None]
    logprobs = torch.log_softmax(model(ids).logits[0, :-1] / temperature, -1).gather(1, ids[0, 1:, None])[:, 0]
    return logprobs[torch.from_numpy(rollout.loss_mask_T[1:])]


@pytest.mark.parametrize("one_by_one", [("cpu",), ()], ids=["one by one", "in grids"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_gives_what_each_sequence_gives_alone(
    name: str, one_by_one: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "ONE_BY_ONE", one_by_one)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=PACKED_ATTENTION).eval()
    packed.load_state_dict(plain.state_dict())
    made = rollouts()
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    with torch.no_grad():
        together, entropy = row_logprobs(packed, row, temperature=0.7)
        alone = [row_logprobs_alone(plain, rollout, 0.7) for rollout in made]
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


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_of_all_lengths_give_what_each_gives_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In grids, as on GPUs, with lengths too different to share one: values and gradients."""
    monkeypatch.setattr(segments, "ONE_BY_ONE", ())
    monkeypatch.setattr(segments, "SHORT", 4)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager")
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=PACKED_ATTENTION)
    packed.load_state_dict(plain.state_dict())
    lengths = (3, 60, 17, 2, 45, 16, 3, 30)
    made = [rollout(length // 2, length - length // 2) for length in lengths]
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    assert len(Grids.of(row).grids) == 4
    row_logprobs(packed, row, temperature=1.0)[0].sum().backward()
    for each in made:
        row_logprobs_alone(plain, each, 1.0).sum().backward()
    wanted = dict(plain.named_parameters())
    for key, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("one_by_one", [("cpu",), ()], ids=["one by one", "in grids"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_that_is_shared_is_computed_once_and_changes_nothing(
    name: str, one_by_one: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, and a sequence between them that shares nothing; values and gradients of each sequence alone."""
    monkeypatch.setattr(segments, "ONE_BY_ONE", one_by_one)
    monkeypatch.setattr(segments, "SHORT", 4)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager")
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=PACKED_ATTENTION)
    packed.load_state_dict(plain.state_dict())
    made = [*group(7, (9, 1, 3, 20)), rollout(4, 5), *group(3, (2, 30, 6))]
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    assert len(row.token_ids_T) == sum(each.num_tokens for each in made) - 3 * 7 - 2 * 3
    weights_N = torch.linspace(-1.0, 1.0, len(row.targets_N))
    together_N, _ = row_logprobs(packed, row, temperature=1.0)
    (together_N * weights_N).sum().backward()
    alone_N = torch.cat([row_logprobs_alone(plain, each, 1.0) for each in made])
    (alone_N * weights_N).sum().backward()
    torch.testing.assert_close(together_N, alone_N, rtol=1e-4, atol=1e-5)
    wanted = dict(plain.named_parameters())
    for key, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[key].grad, rtol=1e-3, atol=1e-4)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_sequences_attend_together_that_are_about_as_long(lengths: list[int]) -> None:
    lists = alike(lengths)
    assert sorted(index for members in lists for index in members) == list(range(len(lengths)))
    for members in lists:
        longest = max(lengths[index] for index in members)
        assert longest <= 64 or min(lengths[index] for index in members) >= 0.75 * longest
    assert len(lists) <= 2 + math.log(max(lengths) / 64, 4 / 3) if max(lengths) > 64 else len(lists) == 1


def test_the_gradient_of_a_sequence_is_no_longer_than_the_sequence() -> None:
    """A slice's would be as long as the row: the backward pass would grow with the square of the sequences."""
    made = rollouts()
    row = pack_row(made, [0.0] * len(made), pad_id=0)
    inputs = [torch.randn(1, 2, len(row.token_ids_T), 8, requires_grad=True) for _ in range(3)]
    attended, _ = forward.packed_attention(torch.nn.Module(), *inputs, None, segments=segments_of(row))
    found, todo = set(), [attended.grad_fn]
    while todo:
        function = todo.pop()
        if function is not None and function not in found:
            found.add(function)
            todo += [earlier for earlier, _ in function.next_functions]
    names = [function.name() for function in found]
    assert sum("Split" in name for name in names) == len(inputs)
    assert not any("Slice" in name for name in names)
