"""The one forward pass of policy and reference: log-probabilities of the loss tokens of a packed row.

Legend: T = tokens of the row, N = its loss tokens, S = sequences that attend together, L = the longest of them, Q = its
queries, H = heads, D = head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from actors.model.head import scores_of, scoring_head
from actors.model.segments import Segments, segments_of
from actors.model.team import SOLO, Share, Team
from algorithms.divergence import Head
from algorithms.logprobs import logprobs_and_entropy
from algorithms.packed import PackedRow

PACKED_ATTENTION = "paceline_packed"
_CHUNK = 2048  # loss tokens whose log-probabilities are computed at once; bounds the float32 copy of the logits


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
    """Causal attention inside each sequence of the row; returns (1, T, H, D). In a team, T are a rank's own tokens.

    On the CPU each sequence attends in a call of its own. On GPUs, where a call costs more than some padding, sequences
    are padded for this one operation, to the longest of those that are about as long, and start at the left, so the
    plain causal kernel is exact: a real token never looks at padding. Everything else in the model runs on the packed
    row. A sliding window is honoured; ValueError for models whose attention has soft-capped scores or sinks, which this
    kernel cannot give.
    """
    assert attention_mask is None, "packed rows carry no mask"
    if softcap is not None or s_aux is not None:
        raise ValueError(
            "model.path: this model's attention has soft-capped scores or attention sinks, which the packed forward "
            "pass does not compute; choose a model without them"
        )
    attended = []
    query_1HTD, key_1HTD, value_1HTD = segments.team.to_heads(query_1HTD, key_1HTD, value_1HTD)
    for query_SHQD, key_SHLD, value_SHLD in segments.calls(query_1HTD, key_1HTD, value_1HTD):
        mask_QL = _mask(query_SHQD.shape[2], key_SHLD.shape[2], sliding_window, query_1HTD.device)
        attended_SHQD = nn.functional.scaled_dot_product_attention(
            query_SHQD,
            key_SHLD,
            value_SHLD,
            attn_mask=mask_QL,
            is_causal=mask_QL is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=key_1HTD.shape[1] != query_1HTD.shape[1],
        )
        attended.append(attended_SHQD)
    return segments.team.to_tokens(segments.join(attended).unsqueeze(0)), None


def _mask(num_queries: int, length: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """Which of a sequence's last tokens sees which of its tokens; None when the plain causal kernel knows."""
    if sliding_window is None or sliding_window >= length:
        if num_queries == length:
            return None
        sliding_window = length
    place_L = torch.arange(length, device=device)
    distance_QL = place_L[length - num_queries :, None] - place_L[None, :]
    return (distance_QL >= 0) & (distance_QL < sliding_window)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def row_logprobs(model: nn.Module, row: PackedRow, temperature: float, team: Team = SOLO) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each loss token of the row, both with gradient: two tensors of shape (N,).

    `model` was loaded with `attn_implementation=PACKED_ATTENTION`. The output head computes only where a loss token is
    predicted, over the sampling temperature, as the rollout replicas do. A scoring head makes no logits beyond a slab
    of the vocabulary; of any other head the logits of the loss tokens are there at once. Every rank of the team makes
    this call, and all get the same.
    """
    share = team.share(row, row.predictor_N)
    inputs, targets_M = _inputs(row, share, team), row.targets_N[share.which_M]
    head = scoring_head(model)
    if head is None:
        found = logprobs_and_entropy(model(**inputs).logits[0], targets_M, temperature, _CHUNK)
    else:
        with head.scoring(targets_M, temperature):
            found = scores_of(model(**inputs).logits)
    return _whole(found, row, share, team)


def row_divergences(
    model: nn.Module, teacher: nn.Module, row: PackedRow, beta: float, temperature: float, team: Team = SOLO
) -> tuple[Tensor, Tensor]:
    """Divergence from the teacher at each loss token of the row, with gradient, and the model's entropy: both (N,).

    Both models were loaded with `attn_implementation=PACKED_ATTENTION` and have scoring heads.
    """
    head, of_teacher = scoring_head(model), scoring_head(teacher)
    assert head is not None, "whole distributions are compared slab by slab"
    assert of_teacher is not None, "whole distributions are compared slab by slab"
    share = team.share(row, row.predictor_N)
    inputs = _inputs(row, share, team)
    with torch.no_grad(), of_teacher.passing():
        hidden_MK = teacher(**inputs).logits[0].to(of_teacher.weight.dtype)
    compared = Head(hidden_MK, of_teacher.weight, of_teacher.bias, of_teacher.behind)
    with head.comparing(compared, beta, temperature):
        return _whole(scores_of(model(**inputs).logits), row, share, team)


def _inputs(row: PackedRow, share: Share, team: Team) -> dict[str, Any]:
    """Of a model that is to predict the row's loss tokens."""
    return {
        "input_ids": share.token_ids_C.unsqueeze(0),
        "position_ids": share.position_ids_C.unsqueeze(0),
        "logits_to_keep": share.place_M,
        "use_cache": False,
        "segments": segments_of(row, team),
    }


def _whole(found: tuple[Tensor, Tensor], row: PackedRow, share: Share, team: Team) -> tuple[Tensor, Tensor]:
    """Of all loss tokens of the row, from those of the share."""
    values_M, entropy_M = found
    num = len(row.targets_N)
    return team.whole(values_M, share, num), team.whole(entropy_M, share, num)


def row_scores(model: nn.Module, row: PackedRow, team: Team = SOLO) -> Tensor:
    """A reward model's score at each loss token of the row, with gradient: a tensor of shape (N,), in float32.

    `model` is what `load_scorer` gives.
    """
    return _scores(model, row, row.place_N, team)


def row_values(model: nn.Module, row: PackedRow, team: Team = SOLO) -> Tensor:
    """A critic's value before each loss token of the row is there, with gradient: a tensor of shape (N,), in float32.

    `model` is what `load_scorer` gives.
    """
    return _scores(model, row, row.predictor_N, team)


def _scores(model: nn.Module, row: PackedRow, places_N: Tensor, team: Team) -> Tensor:
    share = team.share(row, places_N)
    scores_M: Tensor = model(
        input_ids=share.token_ids_C.unsqueeze(0),
        position_ids=share.position_ids_C.unsqueeze(0),
        places_N=share.place_M,
        segments=segments_of(row, team),
    )
    return team.whole(scores_M.float(), share, len(places_N))


def score_places(model: Any, input_ids: Tensor, position_ids: Tensor, places_N: Tensor, segments: Segments) -> Tensor:
    """In place of a sequence classifier's own forward pass, which scores the end of a whole row alone."""
    hidden = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, segments=segments)
    scores_N1: Tensor = model.score(hidden.last_hidden_state[0, places_N])
    return scores_N1[:, 0]
