"""Bytes on one GPU of each pool, part by part: upper estimates, of peaks that fall together.

Weights, gradients and optimizer: Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3.1 and figure 1 (AdamW in mixed
precision holds K = 12 bytes a parameter: float32 weights and two moments), and DeepSpeed's own buffers at their
defaults. Activations: the way of counting of Korthikanti et al., arXiv 2205.05198, section 4.1, carried over from GPT's
layer to Llama's (gated MLP, RMSNorm in float32, no dropout, attention scores never kept), and its 2 s b h bytes a layer
where activations are recomputed. Legend: P = parameters, T = those that are trained, N = ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from placement.memory.shape import ModelShape

GB = 2.0**30

CONTEXT = 1.5 * GB
"""Of the CUDA context, NCCL and what the allocator loses between its blocks."""
_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size (elements)."""
_LIVE = 1_050_000_000
"""DeepSpeed's stage3_max_live_parameters and what it fetches ahead (elements)."""
_SUB_GROUP = 1_000_000_000
"""DeepSpeed's sub_group_size: ZeRO-3 steps through so many elements at a time."""
_SLAB = 2**23
"""Logits that exist at once, in three float32 copies; of a token 128 at least."""
_NARROWEST = 128
_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantization: its four bits, a scale of eight bits for each 64 weights, and of
those a float32 for each 256 (QLoRA, arXiv 2305.14314, section 3)."""
_PADDING = 4 / 3
"""Attention runs on sequences padded to the longest that they attend beside; each is three quarters of it at least."""
_ENGINE_TOKENS = 8192
"""Tokens of one pass of vLLM while it fills prompts (max_num_batched_tokens)."""


@dataclass(frozen=True, slots=True)
class PolicyLoad:
    """What decides the memory of one policy rank."""

    num_ranks: int
    zero_stage: int
    bytes_per_weight: int
    tokens: int
    """Of one micro-batch, which a rank or a team of ranks computes."""
    gradient_checkpointing: bool
    num_trained: int | None = None
    """Parameters of the adapters; None trains every parameter."""
    has_vocabulary: bool = True
    """Whether its head gives logits; a critic's gives one number."""
    four_bits: bool = False
    """The linear layers below the adapters are held in four bits."""
    offload: bool = False
    """The optimizer, and its step, are in the host's memory."""
    offload_weights: bool = False
    """So are the weights, but for those that a layer needs (ZeRO-3)."""
    teacher: float = 0.0
    """Bytes of a frozen model beside, which every rank holds whole."""
    sequence_parallel: int = 1
    """Ranks of a team."""

    @property
    def own_tokens(self) -> int:
        """Of a micro-batch, on one rank."""
        return -(-self.tokens // self.sequence_parallel)


@dataclass(frozen=True, slots=True)
class ReferenceLoad:
    """What decides the memory of one reference worker."""

    bytes_per_weight: int
    tokens: int


@dataclass(frozen=True, slots=True)
class RolloutLoad:
    """What decides the memory of one GPU of a replica."""

    tensor_parallel: int
    bytes_per_weight: int
    utilization: float
    """Share of the GPU that vLLM takes."""
    max_num_seqs: int
    context: int
    """Longest prompt and completion together (tokens)."""
    staged: float = 0.0
    """Bytes of a version that waits in device memory, beside what vLLM takes."""


Footprint = Mapping[str, float]
"""Bytes by part; they are there at one time, so the GPU needs their sum."""


def policy_footprint(shape: ModelShape, load: PolicyLoad) -> Footprint:
    """One rank: ZeRO shards optimizer (1), gradients (2) and weights (3); what is frozen has no gradient.

    Gradients are summed in float32. The optimizer's step comes when the activations are gone, so the larger of the two
    counts.
    """
    total, size, ranks, stage = shape.num_parameters, load.bytes_per_weight, load.num_ranks, load.zero_stage
    trained = total if load.num_trained is None else load.num_trained
    whole = total if load.num_trained is None else total + load.num_trained
    own = trained / ranks if stage >= 1 else float(trained)  # of the optimizer
    summed = 4.0 * (trained / ranks if stage >= 2 else trained)
    fresh = size * trained if stage <= 1 and size < 4 else 0.0  # a backward pass's own, before they are summed
    has_masters = stage >= 1 or size < 4
    step = 8.0 * min(_SUB_GROUP, own) if stage == 3 else 8.0 * own if stage >= 1 else 4.0 * own
    if load.offload:
        step = 0.0
    activations = policy_activations(shape, load)
    head = head_bytes(shape, load.own_tokens, size, trained=load.num_trained is None) if load.has_vocabulary else 0.0
    held = float(size * whole)
    if load.four_bits:  # one layer at a time is there in full, too
        held -= (size - _FOUR_BITS) * shape.quantizable_parameters
        held += size * max(math.prod(sizes) for sizes in shape.linear_layers.values())
    gathered = size * min(_LIVE, whole) if stage == 3 else 0.0
    return {
        "weights": (0.0 if load.offload_weights else held / (ranks if stage == 3 else 1)) + load.teacher,
        "gradients": summed + fresh,
        "optimizer": 0.0 if load.offload else (12.0 if has_masters else 8.0) * own,
        "activations": max(activations, step - head - gathered),
        "output head": head,
        "buffers": CONTEXT + gathered + (size * min(_BUCKET, trained) if stage >= 1 else 0.0),
    }


def policy_activations(shape: ModelShape, load: PolicyLoad) -> float:
    """What the backward pass needs of the forward pass, without the output head.

    In a team a rank has its share of the tokens, and in attention all tokens of its share of the heads, which is as
    much, but for heads of keys and values that several ranks have.
    """
    size, copies = load.bytes_per_weight, max(1.0, load.sequence_parallel / shape.num_kv_heads)
    copied = _PADDING * size * 2 * shape.kv_size * (copies - 1)
    layer = (layer_activations(shape, size) + copied) * load.own_tokens
    if not load.gradient_checkpointing:
        return shape.num_layers * layer
    return shape.num_layers * size * shape.hidden_size * load.own_tokens + layer


def layer_activations(shape: ModelShape, size: int, padding: float = _PADDING) -> float:
    """Bytes that one token leaves in one layer.

    Each norm leaves its input and its quotient in float32 and its result, which the linear layers share; attention
    leaves queries, keys and values as they are and, with its result, padded, and the result once more; the MLP leaves
    its gate, the gate's activation, the other branch and their product, once for each expert that the token visits.
    """
    h, q, kv = shape.hidden_size, shape.query_size, shape.kv_size
    norms = 2 * (4 + 2 * size) * h + (4 + size) * (q + kv) * shape.qk_norm
    attention = size * (2 * q + 2 * kv) + padding * size * (2 * q + 2 * kv)
    visits = max(1, shape.experts_per_token)
    mlp = visits * 4 * size * shape.intermediate_size + (visits * size * h if shape.num_experts else 0)
    return norms + attention + mlp


def head_bytes(shape: ModelShape, tokens: int, size: int, trained: bool, backward: bool = True) -> float:
    """Of the output head: a slab of logits, and going back the gradients of hidden states and of the head itself."""
    slab = 3.0 * 4.0 * max(_SLAB, _NARROWEST * tokens)
    if not backward:
        return slab
    hidden = (4.0 + size) * tokens * shape.hidden_size
    return slab + hidden + (size * shape.embedding_parameters if trained else 0.0)


def reference_footprint(shape: ModelShape, load: ReferenceLoad) -> Footprint:
    """One worker: the whole model, and one layer's work at a time."""
    size = load.bytes_per_weight
    return {
        "weights": float(size * shape.num_parameters),
        "activations": layer_activations(shape, size) * load.tokens,
        "output head": head_bytes(shape, load.tokens, size, trained=False, backward=False),
        "buffers": CONTEXT,
    }


def kv_bytes(shape: ModelShape, load: RolloutLoad) -> float:
    """Keys and values of one token on one GPU; a head of them is not split."""
    heads = max(1.0, shape.num_kv_heads / load.tensor_parallel)
    return 2.0 * shape.num_layers * heads * shape.head_dim * load.bytes_per_weight


def rollout_footprint(shape: ModelShape, load: RolloutLoad, gpu_bytes: float | None) -> Footprint:
    """One GPU of a replica: vLLM gives its KV cache all that is left of its share.

    With the GPU's memory unknown, the cache that every sequence at its longest would fill.
    """
    size, parallel = load.bytes_per_weight, load.tensor_parallel
    weights = size * shape.num_parameters / parallel
    passing = _ENGINE_TOKENS * size * (4.0 * shape.hidden_size + 2.0 * shape.intermediate_size / parallel)
    sampling = 3.0 * 4.0 * load.max_num_seqs * shape.vocab_size
    wanted = load.max_num_seqs * load.context * kv_bytes(shape, load)
    taken = weights + passing + sampling + CONTEXT
    room = wanted if gpu_bytes is None else load.utilization * gpu_bytes - taken
    return {
        "weights": weights,
        "activations": passing,
        "output head": sampling,
        "KV cache": room,
        "buffers": CONTEXT + load.staged,
    }
