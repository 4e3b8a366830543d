"""A model's config says how its work is split between layers, attention and output head; nothing is measured."""

import math
from typing import Any

from transformers import PreTrainedModel

from actors.model.load import load_skeleton
from algorithms.costs import SequenceCosts


def sequence_costs(path: str, revision: str | None, trust_remote_code: bool) -> SequenceCosts:
    """For balancing ranks; reads the config alone. ValueError as in `load_skeleton`.

    Of a model that does not say how large its heads are, or has no output head, the tokens alone are counted.
    """
    try:
        return costs_of(load_skeleton(path, revision, trust_remote_code))
    except AttributeError:
        return SequenceCosts()


def costs_of(model: PreTrainedModel) -> SequenceCosts:
    """Every weight of the layers multiplies each token once, of experts only those that a token is sent to.

    Causal attention of a sequence of L tokens multiplies each token 2 times with L / 2 others, in every head. Layers
    with a sliding window are counted as if they had none to pay for: their cost grows with the length alone.
    """
    config: Any = model.config.get_text_config()
    vocabulary = {id(model.get_input_embeddings().weight)}
    head: Any = model.get_output_embeddings()
    vocabulary |= {id(head.weight)}
    layers = sum(
        parameter.numel() * (_expert_share(config) if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if id(parameter) not in vocabulary and parameter.ndim > 1
    )
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = _num_full_attention(config) * width
    even_length = layers / attention if attention else math.inf
    return SequenceCosts(even_length, head.weight.numel() / layers)


def _num_full_attention(config: Any) -> int:
    """Layers in which a token looks at all that came before."""
    if kinds := getattr(config, "layer_types", None):
        return int(kinds.count("full_attention"))
    return 0 if getattr(config, "sliding_window", None) else int(config.num_hidden_layers)


def _expert_share(config: Any) -> float:
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / num_experts if chosen and num_experts else 1.0
