"""Ranks of a team share out a row token by token, and exchange tokens for heads around attention (Ulysses sequence
parallelism, arXiv 2309.14509).

Outside of attention everything is done to each token alone, so a rank does it to its own tokens; in attention a rank
has all tokens and its share of the heads. Token t belongs to rank t mod R: so the tokens of a completion, which alone
cost the output head something, are shared out as evenly as all others.

Legend: R = ranks of the team, T = tokens of the row, filled up to a multiple of R, C = T / R, a rank's own tokens,
N = what is computed of the row, M = what is computed of a rank's own tokens, H = heads, F = a rank's share of them,
D = head size.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from algorithms.packed import PackedRow


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank computes of a row."""

    token_ids_C: Tensor
    position_ids_C: Tensor
    place_M: Tensor
    """Where among the rank's tokens something is computed."""
    which_M: Tensor | slice
    """Which of the N it is."""


@dataclass(frozen=True, slots=True)
class Team:
    """Ranks that compute the same rows together; of one rank, which computes them as they are, unless said otherwise.

    All of them make the same calls in the same order, the backward passes included.
    """

    rank: int = 0
    """Of this one in the team."""
    size: int = 1
    group: Any = None
    """Of torch.distributed."""

    @classmethod
    def join(cls, rank: int, num_ranks: int, size: int, timeout: timedelta) -> "Team":
        """The team of one of `num_ranks` ranks, which all make this call; neighbours are in one team."""
        if size == 1:
            return cls()
        assert num_ranks % size == 0, f"{num_ranks} ranks make no teams of {size}"
        firsts = range(0, num_ranks, size)
        groups = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in firsts]
        return cls(rank % size, size, groups[rank // size])

    def padding(self, row: PackedRow) -> int:
        """Tokens by which the row is filled up, a sequence of their own."""
        return -len(row.token_ids_T) % self.size

    def share(self, row: PackedRow, place_N: Tensor) -> Share:
        """Of what is computed at N places of the row."""
        if self.size == 1:
            return Share(row.token_ids_T, row.position_ids_T, place_N, slice(None))
        filler = torch.arange(self.padding(row), device=row.token_ids_T.device)
        own_T = torch.cat([row.position_ids_T, filler])[self.rank :: self.size]
        ids_T = torch.cat([row.token_ids_T, row.token_ids_T[:1].expand(len(filler))])[self.rank :: self.size]
        which_M = (place_N % self.size == self.rank).nonzero()[:, 0]
        return Share(ids_T, own_T, place_N[which_M] // self.size, which_M)

    def whole(self, own_M: Tensor, share: Share, num: int) -> Tensor:
        """[N]: what all ranks have computed of their own tokens, on each of them.

        Who differentiates a function of it, as all ranks must, gives each rank the gradient of what it has computed.
        """
        if self.size == 1:
            return own_M
        whole_N: Tensor = _Whole.apply(own_M, share.which_M, num, self.group)
        return whole_N

    def to_heads(self, query_1HCD: Tensor, key_1HCD: Tensor, value_1HCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, F, T, D) of each from (1, H, C, D): all tokens, of this rank's heads.

        Where there are fewer heads of keys and values than ranks, several ranks get the same one.
        """
        if self.size == 1:
            return query_1HCD, key_1HCD, value_1HCD
        copies = max(1, self.size // key_1HCD.shape[1])
        keys_HCD, values_HCD = (each[0].repeat_interleave(copies, 0) for each in (key_1HCD, value_1HCD))
        each_RFCD = [each.unflatten(0, (self.size, -1)) for each in (query_1HCD[0], keys_HCD, values_HCD)]
        to_RFCD = torch.cat(each_RFCD, 1)
        from_RFCD = _Exchange.apply(to_RFCD, self.group)
        all_FTD = from_RFCD.permute(1, 2, 0, 3).flatten(1, 2)  # token t came from rank t mod R
        query_1FTD, key_1FTD, value_1FTD = all_FTD[None].split([each.shape[1] for each in each_RFCD], 1)
        return query_1FTD, key_1FTD, value_1FTD

    def to_tokens(self, attended_1TFD: Tensor) -> Tensor:
        """(1, C, H, D): this rank's tokens, of all heads."""
        if self.size == 1:
            return attended_1TFD
        to_RCFD = attended_1TFD[0].unflatten(0, (-1, self.size)).transpose(0, 1)
        from_RCFD = _Exchange.apply(to_RCFD, self.group)
        return from_RCFD.transpose(0, 1).flatten(1, 2)[None]


SOLO = Team()


class _Exchange(torch.autograd.Function):
    """Part r goes to rank r, and what came from rank r is part r; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads, ctx.group), None


def _exchanged(parts: Tensor, group: Any) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


class _Whole(torch.autograd.Function):
    """Entries of all ranks in one vector. Every rank computes the same of it, so that none needs another's gradient."""

    @staticmethod
    def forward(ctx: Any, own_M: Tensor, which_M: Tensor, num: int, group: Any) -> Tensor:
        ctx.save_for_backward(which_M)
        whole_N = own_M.new_zeros(num).index_copy_(0, which_M, own_M)
        dist.all_reduce(whole_N, group=group)
        return whole_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        (which_M,) = ctx.saved_tensors
        return grad_N[which_M], None, None, None
