"""The number of parameters of a decoder-only model follows from its config.json exactly, or the shape is not known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BIASED = frozenset({"qwen2", "qwen2_moe"})
"""Model types whose attention has biases on queries, keys and values though their config does not say so."""
_NORMED = frozenset({"qwen3", "qwen3_moe"})
"""Model types that normalise queries and keys, head by head."""
_UNKNOWN = ("n_routed_experts", "shared_expert_intermediate_size", "kv_lora_rank", "ssm_cfg", "linear_num_value_heads")
"""Keys of models whose layers are of other kinds than those counted here."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Llama's kind of layer: attention with grouped heads, a gated MLP (or experts, each of which is one)."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Of one MLP; of one expert where there are experts."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False
    """The output head is the embedding."""
    num_experts: int = 0
    experts_per_token: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Of the keys of one token in one layer, and of its values."""
        return self.num_kv_heads * self.head_dim

    def can_share_heads(self, size: int) -> bool:
        """Whether so many ranks can have equally many heads each, and the keys and values that these need."""
        return self.num_heads % size == 0 and (self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0)

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of one layer, by their names in transformers; one expert's."""
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        attention = {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def parameters_per_layer(self) -> int:
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.query_size, self.kv_size
        attention = 2 * h * q + 2 * h * kv + (q + 2 * kv if self.qkv_bias else 0) + (2 * self.head_dim * self.qk_norm)
        mlp = 3 * h * i
        experts = self.num_experts * mlp + h * self.num_experts if self.num_experts else mlp
        return attention + experts + 2 * h

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.num_layers * self.parameters_per_layer + embeddings + self.hidden_size

    @property
    def quantizable_parameters(self) -> int:
        """Of the linear layers that are modules of their own: experts are not."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj") if self.num_experts else tuple(self.linear_layers)
        return self.num_layers * sum(math.prod(self.linear_layers[name]) for name in names)

    def adapter_parameters(self, rank: int, modules: tuple[str, ...] | None) -> int:
        """Of LoRA adapters of this rank on the named linear layers; on all of them with None."""
        adapted = {name: sum(sizes) for name, sizes in self.linear_layers.items() if modules is None or name in modules}
        copies = {name: max(1, self.num_experts) for name in ("gate_proj", "up_proj", "down_proj")}
        return self.num_layers * rank * sum(copies.get(name, 1) * size for name, size in adapted.items())


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json tells; ValueError names the key that is missing or that is not understood."""
    config = config.get("text_config") or config
    for key in _UNKNOWN:
        if config.get(key):
            raise ValueError(f"its layers are of a kind that is not counted here ({key})")
    num_heads = _number(config, "num_attention_heads")
    num_experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
    wide = "moe_intermediate_size" if num_experts and config.get("moe_intermediate_size") else "intermediate_size"
    model_type = config.get("model_type", "")
    return ModelShape(
        num_layers=_number(config, "num_hidden_layers"),
        hidden_size=_number(config, "hidden_size"),
        intermediate_size=_number(config, wide),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or _number(config, "hidden_size") // num_heads),
        vocab_size=_number(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        num_experts=num_experts,
        experts_per_token=_number(config, "num_experts_per_tok") if num_experts else 0,
        qkv_bias=bool(config.get("attention_bias")) or model_type in _BIASED,
        qk_norm=model_type in _NORMED,
    )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"its config.json does not say {key}")
    return value
