"""The one forward pass of policy and reference: log-probabilities of the loss tokens of a packed row.

Legend: T = tokens of the row, N = its loss tokens, S = sequences of the row or of a grid, L = the longest of a grid's,
K = tokens of a grid, H = heads, D = head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from actors.model.head import scores_of, scoring_head
from actors.model.team import SOLO, Share, Team
from algorithms.divergence import Head
from algorithms.logprobs import logprobs_and_entropy
from algorithms.packed import PackedRow

PACKED_ATTENTION = "paceline_packed"
_CHUNK = 2048  # loss tokens whose log-probabilities are computed at once; bounds the float32 copy of the logits
_ONE_BY_ONE = ("cpu",)
"""Devices on which padding, and the copies that it takes, cost more than calls."""
_ALIKE = 0.75
"""Sequences attend together that are at least so long, relative to the longest of them."""
_SHORT = 64
"""Sequences of so few tokens attend together whatever they are, for a call costs more than their padding."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Sequences of about one length, S x L: entry k of the `_K` arrays is about one of their tokens."""

    num_sequences: int
    longest: int
    token_K: Tensor
    """Where in the row it is."""
    slot_K: Tensor
    """Which entry of the grid it is."""

    def take(self, packed_1HTD: Tensor) -> Tensor:
        """The grid's sequences, each from the left, as (S, H, L, D)."""
        _, heads, _, size = packed_1HTD.shape
        flat = packed_1HTD.new_zeros(self.num_sequences * self.longest, heads, size)
        flat = flat.index_copy(0, self.slot_K, packed_1HTD[0].transpose(0, 1)[self.token_K])
        return flat.view(self.num_sequences, self.longest, heads, size).transpose(1, 2)

    def give(self, attended_SHLD: Tensor) -> Tensor:
        """Its tokens alone, as (K, H, D)."""
        return attended_SHLD.transpose(1, 2).flatten(0, 1)[self.slot_K]


@dataclass(frozen=True, slots=True)
class Alone:
    """One sequence as a grid: it lies in the row as it is needed, and nothing is copied."""

    longest: int

    def give(self, attended_1HLD: Tensor) -> Tensor:
        return attended_1HLD[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the sequences of a packed row lie, and which of them attend in one call."""

    grids: tuple[Grid | Alone, ...]
    place_T: Tensor | None
    """Where each token of the row is among those of all grids, one grid after the other; None: they lie as in the row.
    """
    team: Team = SOLO
    """Who has the row's tokens."""

    @classmethod
    def of(cls, row: PackedRow, team: Team = SOLO) -> "Segments":
        device, padding = row.token_ids_T.device, team.padding(row)
        lengths_S = (*row.lengths_S, padding) if padding else row.lengths_S
        if device.type in _ONE_BY_ONE:
            return cls(tuple(map(Alone, lengths_S)), None, team)
        start_S = np.cumsum([0, *lengths_S[:-1]])
        grids, tokens = [], []
        for members in alike(lengths_S):
            lengths = [lengths_S[index] for index in members]
            longest = lengths[0]
            token_K = np.concatenate([start_S[i] + np.arange(n) for i, n in zip(members, lengths, strict=True)])
            slot_K = np.concatenate([place * longest + np.arange(n) for place, n in enumerate(lengths)])
            tokens.append(token_K)
            where = (torch.from_numpy(each).to(device) for each in (token_K, slot_K))
            grids.append(Grid(len(members), longest, *where))
        return cls(tuple(grids), torch.from_numpy(np.argsort(np.concatenate(tokens))).to(device), team)

    def take(self, packed_1HTD: Tensor) -> Sequence[Tensor]:
        """The sequences of each grid, as (S, H, L, D).

        Those that lie as in the row are split off in one operation: the gradient of a slice is as long as the row.
        """
        if self.place_T is None:
            return packed_1HTD.split([grid.longest for grid in self.grids], dim=2)
        return [grid.take(packed_1HTD) for grid in self.grids if isinstance(grid, Grid)]


def alike(lengths_S: Sequence[int]) -> list[list[int]]:
    """Every sequence in one list, longest first, each at least `_ALIKE` of the list's first, or all of them short."""
    lists: list[list[int]] = []
    least = math.inf
    for index in sorted(range(len(lengths_S)), key=lambda index: -lengths_S[index]):
        if lengths_S[index] < least:
            lists.append([])
            least = lengths_S[index] * _ALIKE if lengths_S[index] > _SHORT else 0
        lists[-1].append(index)
    return lists


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
    taken = (segments.take(packed_1HTD) for packed_1HTD in (query_1HTD, key_1HTD, value_1HTD))
    for grid, query_SHLD, key_SHLD, value_SHLD in zip(segments.grids, *taken, strict=True):
        window_LL = None if sliding_window is None else _window(grid.longest, sliding_window, query_1HTD.device)
        attended_SHLD = nn.functional.scaled_dot_product_attention(
            query_SHLD,
            key_SHLD,
            value_SHLD,
            attn_mask=window_LL,
            is_causal=window_LL is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=key_1HTD.shape[1] != query_1HTD.shape[1],
        )
        attended.append(grid.give(attended_SHLD))
    attended_THD = torch.cat(attended)
    attended_THD = attended_THD if segments.place_T is None else attended_THD[segments.place_T]
    return segments.team.to_tokens(attended_THD.unsqueeze(0)), None


def _window(length: int, sliding_window: int, device: torch.device) -> Tensor | None:
    """Which token sees which; None when the window is no shorter than the sequence."""
    if sliding_window >= length:
        return None
    place_L = torch.arange(length, device=device)
    distance_LL = place_L[:, None] - place_L[None, :]
    return (distance_LL >= 0) & (distance_LL < sliding_window)


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
        hidden_MK = teacher(**inputs).logits[0]
    with head.comparing(Head(hidden_MK, of_teacher.weight, of_teacher.bias), beta, temperature):
        return _whole(scores_of(model(**inputs).logits), row, share, team)


def _inputs(row: PackedRow, share: Share, team: Team) -> dict[str, Any]:
    """Of a model that is to predict the row's loss tokens."""
    return {
        "input_ids": share.token_ids_C.unsqueeze(0),
        "position_ids": share.position_ids_C.unsqueeze(0),
        "logits_to_keep": share.place_M,
        "use_cache": False,
        "segments": Segments.of(row, team),
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
    return _scores(model, row, row.predictor_N + 1, team)


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
        segments=Segments.of(row, team),
    )
    return team.whole(scores_M.float(), share, len(places_N))


def score_places(model: Any, input_ids: Tensor, position_ids: Tensor, places_N: Tensor, segments: Segments) -> Tensor:
    """In place of a sequence classifier's own forward pass, which scores the end of a whole row alone."""
    hidden = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, segments=segments)
    scores_N1: Tensor = model.score(hidden.last_hidden_state[0, places_N])
    return scores_N1[:, 0]
