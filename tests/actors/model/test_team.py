"""A row that a team shares out gives what it gives one rank, values and gradients, in less memory on each."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from actors.model import segments
from actors.model.forward import PACKED_ATTENTION, row_divergences, row_logprobs, row_scores, row_values, score_places
from actors.model.head import put_scoring_head
from actors.model.heads import check_heads, uneven_heads
from actors.model.team import SOLO, Team
from algorithms.packed import PackedRow, pack_row
from algorithms.types import Rollout
from tests.actors.model.threads import in_a_team

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "grouped heads": LlamaConfig(**SIZES, num_key_value_heads=2),
    "one head of keys": LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "normalised heads, tied": Qwen3Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=True),
    "a window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=5),
}


def rollout(prompt: int, completion: int) -> Rollout:
    total = prompt + completion
    tokens = np.random.default_rng(total).integers(1, 97, total).astype(np.int32)
    return Rollout(tokens, np.arange(total) >= prompt, np.zeros(total, np.float32), (), "stop")


def row_of(*lengths: tuple[int, int]) -> PackedRow:
    made = [rollout(*each) for each in lengths]
    return pack_row(made, [0.0] * len(made), pad_id=0)


Values = Callable[[Any, PackedRow, Team], Sequence[torch.Tensor]]


def computed(
    model: Any, row: PackedRow, team: Team, values: Values
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Values of the row's tokens, and gradients of a function in which each of them has its own weight."""
    model = copy.deepcopy(model)
    found = values(model, row, team)
    weight_N = torch.linspace(-1, 2, len(row.targets_N))
    loss = sum(((weight_N + place) * each).sum() for place, each in enumerate(found) if each.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    return [each.detach() for each in found], {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def check_is_one(model: Any, row: PackedRow, size: int, values: Values) -> None:
    """Every rank of the team has the values that one rank has, and their gradients sum up to its gradient."""
    alone, gradients = computed(model, row, SOLO, values)
    ranks = in_a_team(size, lambda team: computed(model, row, team, values))
    for found, _ in ranks:
        for mine, its in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        together = sum(own[name] for _, own in ranks)
        torch.testing.assert_close(together, gradient, rtol=1e-4, atol=1e-5, msg=name)


def logprobs(model: Any, row: PackedRow, team: Team) -> Sequence[torch.Tensor]:
    return row_logprobs(model, row, 0.7, team)


def language_model(name: str, scoring: bool) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=PACKED_ATTENTION)
    assert not scoring or put_scoring_head(model)
    return model


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_team_computes_what_one_rank_computes(name: str, size: int) -> None:
    check_is_one(language_model(name, scoring=True), row_of((4, 9), (1, 1), (7, 13), (2, 3)), size, logprobs)


@pytest.mark.parametrize("lengths", [[(30, 1)], [(1, 1)], [], [(3, 40), (5, 8)]], ids=str)
def test_ranks_without_a_loss_token_take_part(lengths: list[tuple[int, int]]) -> None:
    check_is_one(language_model("grouped heads", scoring=True), row_of(*lengths), 4, logprobs)


def test_a_head_that_makes_logits_and_layers_that_are_recomputed() -> None:
    model = language_model("grouped heads", scoring=False)
    model.gradient_checkpointing_enable()
    check_is_one(model.train(), row_of((4, 9), (7, 13)), 2, logprobs)


def test_sequences_that_attend_in_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ONE_BY_ONE", ())  # as on GPUs
    monkeypatch.setattr(segments, "SHORT", 4)
    check_is_one(language_model("grouped heads", scoring=True), row_of((4, 9), (1, 1), (20, 13), (2, 3)), 2, logprobs)


def row_of_shared_prompts() -> PackedRow:
    prompt = np.arange(1, 8, dtype=np.int32)
    made = [
        Rollout(np.append(prompt, of.token_ids_T).astype(np.int32), np.arange(7 + of.num_tokens) >= 7,
                np.zeros(7 + of.num_tokens, np.float32), (), "stop")
        for of in (rollout(0, 5), rollout(0, 12), rollout(0, 1))
    ]  # fmt: skip
    row = pack_row([*made, rollout(3, 4)], [0.0] * 4, pad_id=0)
    assert row.shared_S == (0, 7, 7, 0)
    return row


@pytest.mark.parametrize("devices", [segments.ONE_BY_ONE, ()], ids=["one by one", "in grids"])
def test_sequences_that_share_their_prompt(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ONE_BY_ONE", devices)
    check_is_one(language_model("grouped heads", scoring=True), row_of_shared_prompts(), 2, logprobs)


def check_is_one_in_bfloat16(model: Any, row: PackedRow, size: int, values: Values) -> None:
    """In bfloat16 ranks and one rank are nearer to each other than one rank is to the same weights in float32."""
    halves = model.to(torch.bfloat16)
    exact, exact_gradients = computed(copy.deepcopy(halves).float(), row, SOLO, values)
    alone, gradients = computed(halves, row, SOLO, values)
    ranks = in_a_team(size, lambda team: computed(halves, row, team, values))
    for found, _ in ranks:
        for mine, its, exactly in zip(found, alone, exact, strict=True):
            assert 0 < (its - exactly).norm() < 0.1 * exactly.norm()
            assert (mine - its).norm() <= (its - exactly).norm()
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients.values())
    for name, gradient in gradients.items():
        together = sum(own[name].float() for _, own in ranks)
        rounding = (gradient.float() - exact_gradients[name]).norm()
        assert 0 < rounding < 0.1 * exact_gradients[name].norm(), name
        assert (together - gradient.float()).norm() <= rounding, name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_team_in_bfloat16(name: str, size: int) -> None:
    row = row_of((4, 9), (1, 1), (7, 13), (2, 3))
    check_is_one_in_bfloat16(language_model(name, scoring=True), row, size, logprobs)


def test_a_team_in_bfloat16_whose_sequences_share_their_prompt() -> None:
    check_is_one_in_bfloat16(language_model("grouped heads", scoring=True), row_of_shared_prompts(), 2, logprobs)


def scorer() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=1)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation=PACKED_ATTENTION)


def scored(numbers: Any) -> Values:
    def found(model: Any, row: PackedRow, team: Team) -> Sequence[torch.Tensor]:
        model.forward = score_places.__get__(model)
        return [numbers(model, row, team)]

    return found


@pytest.mark.parametrize("numbers", [row_scores, row_values])
def test_a_head_of_one_number(numbers: Any) -> None:
    check_is_one(scorer(), row_of((4, 9), (1, 1), (7, 13)), 2, scored(numbers))
    check_is_one(scorer(), row_of_shared_prompts(), 2, scored(numbers))


def test_a_head_of_one_number_in_bfloat16() -> None:
    check_is_one_in_bfloat16(scorer(), row_of_shared_prompts(), 2, scored(row_values))


def test_a_teacher_beside() -> None:
    teacher = language_model("normalised heads, tied", scoring=True)

    def compared(model: Any, row: PackedRow, team: Team) -> Sequence[torch.Tensor]:
        divergence_N, entropy_N = row_divergences(model, copy.deepcopy(teacher), row, 0.5, 0.9, team)
        return [divergence_N, entropy_N.detach()]

    check_is_one(language_model("grouped heads", scoring=True), row_of((4, 9), (7, 13)), 2, compared)


def kept_bytes(model: Any, row: PackedRow, team: Team) -> int:
    """Bytes that autograd keeps of the forward pass of a row, besides the parameters."""
    model = copy.deepcopy(model)
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}
    alive = []  # or another tensor could take the place of one that was counted

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        row_logprobs(model, row, 1.0, team)
    return sum(kept.values())


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_keeps_its_share_of_the_activations(size: int) -> None:
    model, row = language_model("grouped heads", scoring=True), row_of((100, 700))
    alone = kept_bytes(model, row, SOLO)
    for kept in in_a_team(size, lambda team: kept_bytes(model, row, team)):
        assert kept / alone == pytest.approx(1 / size, rel=0.1 * size / 2)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=6), st.integers(1, 5))
def test_every_token_and_every_place_is_with_one_rank(lengths: list[tuple[int, int]], size: int) -> None:
    row = row_of(*lengths)
    shares = [Team(rank, size).share(row, row.predictor_N) for rank in range(size)]
    num_own = {len(share.token_ids_C) for share in shares}
    assert num_own == {-(-len(row.token_ids_T) // size)}
    ids = torch.stack([share.token_ids_C for share in shares], 1).flatten()
    assert ids[: len(row.token_ids_T)].equal(row.token_ids_T)
    places = torch.cat([torch.arange(len(row.targets_N))[share.which_M] for share in shares])
    assert places.sort().values.equal(torch.arange(len(row.targets_N)))
    for rank, share in enumerate(shares):
        assert (share.place_M * size + rank).equal(row.predictor_N[share.which_M])
    counts = [len(share.place_M) for share in shares]
    runs = 1 + int((row.predictor_N.diff() != 1).sum())  # of neighbours, of which no rank has two more than another
    assert max(counts) - min(counts) <= runs, "completions are shared out as evenly as the rest"
    assert runs <= max(1, 2 * len(lengths)), "a completion, and its first token where its prompt is another's as well"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "problem"),
    [
        (4, 2, 2, None),
        (4, 2, 4, None),
        (28, 4, 4, None),
        (28, 4, 8, "8 ranks cannot share out the model's 28 attention heads and 4 heads of keys and values evenly; set "
         "it to 1, 2, 4 or 28"),
        (12, 2, 3, "3 ranks cannot share out the model's 12 attention heads and 2 heads of keys and values evenly; set "
         "it to 1, 2, 4, 6 or 12"),
        (1, 1, 2, "2 ranks cannot share out the model's 1 attention heads and 1 heads of keys and values evenly; set "
         "it to 1"),
    ],
)  # fmt: skip
def test_heads_that_cannot_be_shared_out_are_refused(heads: int, kv_heads: int, size: int, problem: str | None) -> None:
    assert uneven_heads(heads, kv_heads, size) == problem
    model = type(
        "Model",
        (),
        {"config": LlamaConfig(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)},
    )
    if problem is None:
        check_heads(model, size, "policy.sequence_parallel_size")
        return
    with pytest.raises(ValueError, match=r"^policy\.sequence_parallel_size: .* ranks cannot share out"):
        check_heads(model, size, "policy.sequence_parallel_size")
