"""Which tokens of a packed row attend to which, and in which calls: every sequence to itself, what it shares included.

Legend: T = tokens of the row, S = sequences of the row or of a grid, L = the longest of a grid's, Q = queries of a
sequence, K = tokens of a grid, H = heads, D = head size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from algorithms.packed import PackedRow

Call = tuple[Tensor, Tensor, Tensor]
"""Queries (S, H, Q, D), keys and values (S, H, L, D) of sequences; the last query goes with the last key."""

ONE_BY_ONE = ("cpu",)
"""Devices on which padding, and the copies that it takes, cost more than calls."""
ALIKE = 0.75
"""Sequences attend together that are at least so long, relative to the longest of them."""
SHORT = 64
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
class Grids:
    """Sequences that attend together, padded; a beginning that several share is there with each of them."""

    grids: tuple[Grid, ...]
    place_T: Tensor
    """Where each token of the row is among those of all grids, one grid after the other."""

    @classmethod
    def of(cls, row: PackedRow) -> "Grids":
        device = row.token_ids_T.device
        places_S = _places(row)
        grids, tokens = [], []
        for members in alike(row.lengths_S):
            lengths = [row.lengths_S[index] for index in members]
            longest = lengths[0]
            token_K = np.concatenate([places_S[index] for index in members])
            slot_K = np.concatenate([place * longest + np.arange(n) for place, n in enumerate(lengths)])
            tokens.append(token_K)
            where = (torch.from_numpy(each).to(device) for each in (token_K, slot_K))
            grids.append(Grid(len(members), longest, *where))
        # Of a token that several sequences share, each has made the same; the first's is taken.
        _, place_T = np.unique(np.concatenate(tokens), return_index=True)
        return cls(tuple(grids), torch.from_numpy(place_T).to(device))

    def calls(self, query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor) -> Iterator[Call]:
        for grid in self.grids:
            yield grid.take(query_1HTD), grid.take(key_1HTD), grid.take(value_1HTD)

    def join(self, attended: Sequence[Tensor]) -> Tensor:
        given = [grid.give(of_grid) for grid, of_grid in zip(self.grids, attended, strict=True)]
        return torch.cat(given)[self.place_T]


@dataclass(frozen=True, slots=True)
class Alone:
    """Each sequence attends in a call of its own.

    Where no beginning is shared the sequences lie in the row as they are needed, and nothing is copied.
    """

    cuts: tuple[int, ...]
    """Lengths of the row's pieces, in order: beginnings that are shared, and what is a sequence's own."""
    pieces_S: tuple[tuple[int, ...], ...]
    """Of which pieces each sequence is made."""
    asks_S: tuple[tuple[int, ...], ...]
    """Of which of these the queries are."""
    known_S: tuple[int, ...]
    """How many of the sequence's first answers another sequence has had before, and are left out."""

    @classmethod
    def of(cls, row: PackedRow) -> "Alone":
        cuts: list[int] = []
        pieces: list[tuple[int, ...]] = []
        asks: list[tuple[int, ...]] = []
        known: list[int] = []
        beginning = 0
        follows = (*row.shared_S[1:], 0)
        for length, shared, following in zip(row.lengths_S, row.shared_S, follows, strict=True):
            own = len(cuts)
            if shared:
                cuts.append(length - shared)
                pieces.append((beginning, own))
            elif following:
                beginning = own
                cuts += [following, length - following]
                pieces.append((own, own + 1))
            else:
                cuts.append(length)
                pieces.append((own,))
            # A causal call looks at half of what a masked one looks at, and may ask more than is wanted.
            again = bool(shared) and length - shared > max(shared, SHORT)
            asks.append(pieces[-1] if again or not shared else pieces[-1][1:])
            known.append(shared if again else 0)
        return cls(tuple(cuts), tuple(pieces), tuple(asks), tuple(known))

    def calls(self, query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor) -> Iterator[Call]:
        queries = self._taken(query_1HTD, self.asks_S)
        keys, values = (self._taken(packed_1HTD, self.pieces_S) for packed_1HTD in (key_1HTD, value_1HTD))
        return zip(queries, keys, values, strict=True)

    def _taken(self, packed_1HTD: Tensor, pieces_S: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """The sequences' tokens, each (1, H, L, D).

        They are split off in one operation, after one copy at most: the gradient of a slice is as long as the row.
        """
        wanted = [piece for pieces in pieces_S for piece in pieces]
        if wanted != list(range(len(self.cuts))):
            parts = packed_1HTD.split(self.cuts, dim=2)
            packed_1HTD = torch.cat([parts[piece] for piece in wanted], dim=2)
        return packed_1HTD.split([sum(self.cuts[piece] for piece in pieces) for pieces in pieces_S], dim=2)

    def join(self, attended: Sequence[Tensor]) -> Tensor:
        answers = (of_sequence[0].transpose(0, 1) for of_sequence in attended)
        return torch.cat([each[known:] if known else each for each, known in zip(answers, self.known_S, strict=True)])


Segments = Grids | Alone


def segments_of(row: PackedRow) -> Segments:
    """On the CPU one by one; on GPUs, where a call costs more than some padding, together."""
    return Alone.of(row) if row.token_ids_T.device.type in ONE_BY_ONE else Grids.of(row)


def _places(row: PackedRow) -> list[np.ndarray]:
    """Where in the row the tokens of each sequence are."""
    places: list[np.ndarray] = []
    first = 0
    own = [length - shared for length, shared in zip(row.lengths_S, row.shared_S, strict=True)]
    for start, length, shared in zip(accumulate(own, initial=0), own, row.shared_S, strict=False):
        first = first if shared else start
        places.append(np.concatenate([first + np.arange(shared), start + np.arange(length)]))
    return places


def alike(lengths_S: Sequence[int]) -> list[list[int]]:
    """Every sequence in one list, longest first, each at least `ALIKE` of the list's first, or all of them short."""
    lists: list[list[int]] = []
    least = math.inf
    for index in sorted(range(len(lengths_S)), key=lambda index: -lengths_S[index]):
        if lengths_S[index] < least:
            lists.append([])
            least = lengths_S[index] * ALIKE if lengths_S[index] > SHORT else 0
        lists[-1].append(index)
    return lists
