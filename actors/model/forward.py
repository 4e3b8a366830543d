"""The one forward pass of policy and reference: log-probabilities of the loss tokens of a packed row.

Legend: T = tokens of the row, S = its sequences, L = longest of them, N = its loss tokens, H = heads, D = head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from actors.model.head import scores_of, scoring_head
from algorithms.logprobs import logprobs_and_entropy
from algorithms.packed import PackedRow

PACKED_ATTENTION = "paceline_packed"
_CHUNK = 2048  # loss tokens whose log-probabilities are computed at once; bounds the float32 copy of the logits


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the sequences of a packed row lie: token t of the row is entry `slot_T[t]` of an S x L grid."""

    num_sequences: int
    longest: int
    slot_T: Tensor

    @classmethod
    def of(cls, row: PackedRow) -> "Segments":
        longest = max(row.lengths_S)
        lengths_S = torch.tensor(row.lengths_S, device=row.token_ids_T.device)
        sequence_T = torch.repeat_interleave(torch.arange(len(row.lengths_S), device=lengths_S.device), lengths_S)
        return cls(len(row.lengths_S), longest, sequence_T * longest + row.position_ids_T)


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of the row; returns (1, T, H, D).

    Sequences are padded for this one operation only and start at the left, so the plain causal kernel is exact: a real
    token never looks at padding. Everything else in the model runs on the packed row. A sliding window is honoured;
    ValueError for models whose attention has soft-capped scores or sinks, which this kernel cannot give.
    """
    assert attention_mask is None, "packed rows carry no mask"
    if softcap is not None or s_aux is not None:
        raise ValueError(
            "model.path: this model's attention has soft-capped scores or attention sinks, which the packed forward "
            "pass does not compute; choose a model without them"
        )
    window_LL = None
    if sliding_window is not None and sliding_window < segments.longest:
        place_L = torch.arange(segments.longest, device=query_1HTD.device)
        distance_LL = place_L[:, None] - place_L[None, :]
        window_LL = (distance_LL >= 0) & (distance_LL < sliding_window)

    def spread(packed_1HTD: Tensor) -> Tensor:
        heads, size = packed_1HTD.shape[1], packed_1HTD.shape[3]
        grid = packed_1HTD.new_zeros(segments.num_sequences * segments.longest, heads, size)
        grid = grid.index_copy(0, segments.slot_T, packed_1HTD[0].transpose(0, 1))
        return grid.view(segments.num_sequences, segments.longest, heads, size).transpose(1, 2)

    attended_SHLD = nn.functional.scaled_dot_product_attention(
        spread(query_1HTD),
        spread(key_1HTD),
        spread(value_1HTD),
        attn_mask=window_LL,
        is_causal=window_LL is None,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=key_1HTD.shape[1] != query_1HTD.shape[1],
    )
    flat = attended_SHLD.transpose(1, 2).flatten(0, 1)
    return flat[segments.slot_T].unsqueeze(0), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def row_logprobs(model: nn.Module, row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each loss token of the row, both with gradient: two tensors of shape (N,).

    `model` was loaded with `attn_implementation=PACKED_ATTENTION`. The output head computes only where a loss token is
    predicted, over the sampling temperature, as the rollout replicas do. A scoring head makes no logits beyond a slab
    of the vocabulary; of any other head the logits of the loss tokens are there at once.
    """
    inputs = {
        "input_ids": row.token_ids_T.unsqueeze(0),
        "position_ids": row.position_ids_T.unsqueeze(0),
        "logits_to_keep": row.predictor_N,
        "use_cache": False,
        "segments": Segments.of(row),
    }
    head = scoring_head(model)
    if head is None:
        return logprobs_and_entropy(model(**inputs).logits[0], row.targets_N, temperature, _CHUNK)
    with head.scoring(row.targets_N, temperature):
        return scores_of(model(**inputs).logits)
