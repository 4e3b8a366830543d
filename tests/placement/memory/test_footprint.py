"""Bytes on a GPU, held against the papers' own figures, against hand calculation, and against what autograd keeps."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from actors.model import segments
from actors.model.forward import PACKED_ATTENTION, row_logprobs
from actors.model.segments import alike
from algorithms.packed import pack_row
from algorithms.types import Rollout
from placement.memory.footprint import (
    GB,
    PolicyLoad,
    ReferenceLoad,
    RolloutLoad,
    kv_bytes,
    layer_activations,
    policy_footprint,
    reference_footprint,
    rollout_footprint,
)
from placement.memory.host import policy_host_bytes
from placement.memory.shape import ModelShape, shape_of

SEVEN = ModelShape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True)
SEVENTY = ModelShape(80, 8192, 28672, 64, 8, 128, 128256)
P = SEVEN.num_parameters


def load(**more: Any) -> PolicyLoad:
    return PolicyLoad(
        **(
            {"num_ranks": 8, "zero_stage": 3, "bytes_per_weight": 2, "tokens": 4096, "gradient_checkpointing": True}
            | more
        )
    )


@pytest.mark.parametrize(
    ("stage", "size", "weights", "gradients", "optimizer"),
    [
        # Bytes a parameter. ZeRO's figure 1 has 2 + 2 + 12 and float16 sums; ours are summed in float32, and below
        # stage 2 a backward pass's own gradient stands beside the sum.
        (0, 2, 2, 6, 12),
        (1, 2, 2, 6, 12 / 8),
        (2, 2, 2, 4 / 8, 12 / 8),
        (3, 2, 2 / 8, 4 / 8, 12 / 8),
        (0, 4, 4, 4, 8),
        (1, 4, 4, 4, 12 / 8),
        (2, 4, 4, 4 / 8, 12 / 8),
        (3, 4, 4 / 8, 4 / 8, 12 / 8),
    ],
)
def test_zero_shards_what_its_paper_says(
    stage: int, size: int, weights: float, gradients: float, optimizer: float
) -> None:
    found = policy_footprint(SEVEN, load(zero_stage=stage, bytes_per_weight=size))
    per_parameter = [found[part] / P for part in ("weights", "gradients", "optimizer")]
    assert per_parameter == pytest.approx([weights, gradients, optimizer])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_never_need_more_each(stage: int) -> None:
    sums = [
        sum(policy_footprint(SEVEN, load(zero_stage=stage, num_ranks=ranks)).values()) for ranks in (1, 2, 4, 8, 16)
    ]
    assert sums == sorted(sums, reverse=True)


def test_adapters_alone_have_gradients_and_an_optimizer() -> None:
    trained = SEVENTY.adapter_parameters(32, None)
    found = policy_footprint(SEVENTY, load(num_trained=trained))
    assert found["weights"] == pytest.approx(2 * (SEVENTY.num_parameters + trained) / 8)
    assert found["gradients"] == pytest.approx(4 * trained / 8)
    assert found["optimizer"] == pytest.approx(12 * trained / 8)


def test_recomputed_activations_are_one_vector_a_layer_and_one_layer() -> None:
    tokens, layer = 4096, layer_activations(SEVEN, 2)
    kept = policy_footprint(SEVEN, load(gradient_checkpointing=False, num_ranks=64))["activations"]
    again = policy_footprint(SEVEN, load(num_ranks=64))["activations"]
    assert kept == pytest.approx(28 * layer * tokens)
    assert again == pytest.approx(28 * 2 * 3584 * tokens + layer * tokens)  # 2 s b h a layer: arXiv 2205.05198


def test_the_output_head_costs_a_slab_of_logits_and_its_gradients() -> None:
    slab = 3 * 4 * 2**23
    assert reference_footprint(SEVEN, ReferenceLoad(2, 4096))["output head"] == slab
    assert policy_footprint(SEVEN, load())["output head"] == slab + 6 * 4096 * 3584 + 2 * 152064 * 3584
    frozen = policy_footprint(SEVEN, load(num_trained=1))["output head"]
    assert frozen == slab + 6 * 4096 * 3584  # no adapter is on the head, so it has no gradient
    assert reference_footprint(SEVEN, ReferenceLoad(2, 2**17))["output head"] == 3 * 4 * 128 * 2**17


@pytest.mark.parametrize(
    ("shape", "parallel", "size", "expected"),
    [
        (SEVEN, 1, 2, 2 * 28 * 4 * 128 * 2),
        (SEVEN, 2, 2, 2 * 28 * 2 * 128 * 2),
        (SEVEN, 8, 2, 2 * 28 * 1 * 128 * 2),  # four heads cannot be cut into eight
        (SEVEN, 1, 4, 2 * 28 * 4 * 128 * 4),
        (SEVENTY, 8, 2, 2 * 80 * 1 * 128 * 2),
        (SEVENTY, 1, 2, 327_680),  # 320 KiB a token, as is well known of this model
    ],
)
def test_a_token_s_keys_and_values(shape: ModelShape, parallel: int, size: int, expected: int) -> None:
    assert kv_bytes(shape, RolloutLoad(parallel, size, 0.9, 1, 1)) == expected


def test_a_replica_takes_its_share_and_no_more() -> None:
    found = rollout_footprint(SEVEN, RolloutLoad(1, 2, 0.85, 128, 4096), 80 * GB)
    assert sum(found.values()) == pytest.approx(0.85 * 80 * GB)
    staged = rollout_footprint(SEVEN, RolloutLoad(1, 2, 0.85, 128, 4096, staged=10 * GB), 80 * GB)
    assert sum(staged.values()) == pytest.approx(0.85 * 80 * GB + 10 * GB)


def test_a_replica_of_unknown_gpus_is_given_a_cache_for_all() -> None:
    asked = RolloutLoad(2, 2, 0.85, 16, 4096)
    assert rollout_footprint(SEVEN, asked, None)["KV cache"] == 16 * 4096 * kv_bytes(SEVEN, asked)


SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32, "vocab_size": 97}


def kept_bytes(model: torch.nn.Module, lengths: list[int]) -> int:
    """Bytes that autograd keeps of the forward pass of one row, besides the parameters."""
    rollouts = [
        Rollout(np.full(n, i + 1, np.int32), np.arange(n) >= n - 4, np.zeros(n, np.float32), (), "stop")
        for i, n in enumerate(lengths)  # no two begin alike
    ]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # or another tensor could take the place of one that was counted

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, _ = row_logprobs(model, pack_row(rollouts, [0.0] * len(rollouts), pad_id=0), 1.0)
    assert logprobs.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "lengths", [[64] * 8, [16, 32, 64, 128, 256], [128, 100, 200, 160]], ids=["equal", "unequal", "alike"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_layer_keeps_what_autograd_keeps(
    kind: Any, dtype: torch.dtype, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "ONE_BY_ONE", ())  # as on GPUs, where sequences attend together
    kept = []
    for num_layers in (2, 4):
        config = kind(**SIZES, num_hidden_layers=num_layers, num_key_value_heads=4, max_position_embeddings=512)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION).to(dtype)
        kept.append(kept_bytes(model, lengths))
    tokens = sum(lengths)
    per_token = (kept[1] - kept[0]) / 2 / tokens
    padding = sum(len(members) * max(lengths[index] for index in members) for members in alike(lengths)) / tokens
    assert layer_activations(shape_of(config.to_dict()), dtype.itemsize, padding) == pytest.approx(per_token, rel=0.02)


def test_a_base_of_four_bits_takes_a_quarter_of_its_linear_layers() -> None:
    """QLoRA, section 3: 4.127 bits a weight; embeddings and norms stay as they are, and one layer is there in full."""
    adapters = SEVENTY.adapter_parameters(16, None)
    found = policy_footprint(SEVENTY, load(zero_stage=2, num_trained=adapters, four_bits=True))["weights"]
    linear = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert SEVENTY.quantizable_parameters == linear
    others = SEVENTY.num_parameters - linear + adapters
    assert found == pytest.approx(linear * 4.127 / 8 + 2 * others + 2 * 8192 * 28672, rel=1e-4)
    plain = policy_footprint(SEVENTY, load(zero_stage=2, num_trained=adapters))["weights"]
    assert 0.25 < found / plain < 0.32


def test_an_optimizer_on_the_host_takes_nothing_of_the_gpu() -> None:
    here, there = (policy_footprint(SEVEN, load(zero_stage=2, offload=offload)) for offload in (False, True))
    assert here["optimizer"] == 12 * P / 8
    assert there["optimizer"] == 0
    assert here["weights"] == there["weights"]
    assert here["gradients"] == there["gradients"]
    on_host = [policy_host_bytes(SEVEN, load(offload=offload), 8, True) for offload in (False, True)]
    assert on_host == [max(2 * 8 * P, 12 * P), max(2 * 8 * P, (16 + 12) * P)]
