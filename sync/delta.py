"""A patch turns one version's bytes into the next one's, bit for bit, and holds only the elements that changed.

In reinforcement learning few elements of a bf16 weight change in a step (about 1 %: arXiv 2602.03839). An element has
changed when its bytes have: -0.0 is not 0.0, and the payload of a NaN counts. A patch is, in this order:

    count, itemsize, width    int64 each
    values                    `count` elements of `itemsize` bytes, and a byte more where they are odd
    gaps                      the unchanged elements before each changed one, in codes of `width` bytes; the largest
                              code stands for as many unchanged elements as its value and says that the gap goes on
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_HEAD = 3 * 8  # bytes
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WIDTHS = (1, 2)


def encode(previous: Tensor, current: Tensor, itemsize: int) -> Tensor:
    """The patch from `previous` to `current`: uint8 of one length, on the host, a multiple of `itemsize`."""
    ours = current.view(_WORDS[itemsize])
    positions = _differing(previous.view(_WORDS[itemsize]), ours)
    gaps = positions.diff(prepend=positions.new_full((1,), -1)) - 1
    width = min(_WIDTHS, key=lambda width: _num_codes(gaps, width) * width)
    head = torch.tensor([positions.numel(), itemsize, width])
    values = ours[positions].view(torch.uint8)
    even = values.new_zeros(values.numel() % 2)
    return torch.cat([head.view(torch.uint8), values, even, _coded(gaps, width).view(torch.uint8)])


def apply(patch: Tensor, buffer: Tensor) -> Tensor:
    """Bring `buffer` (uint8, on the host) to the patch's version in place; returns the patch that undoes it.

    ValueError when the patch is damaged; nothing is written then.
    """
    parts = _Parts.of(patch)
    words = buffer.view(_WORDS[parts.itemsize]) if buffer.numel() % parts.itemsize == 0 else buffer[:0]
    positions = _positions(parts.codes)
    if positions.numel() != parts.count or (parts.count and int(positions[-1]) >= words.numel()):
        raise ValueError("the patch is damaged: its positions do not fit")
    undo = patch.clone()
    _Parts.of(undo).values.copy_(words[positions])
    words[positions] = parts.values
    return undo


def num_changed(patch: Tensor) -> int:
    """How many elements the patch changes."""
    return _Parts.of(patch).count


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a patch, as views of it."""

    count: int
    itemsize: int
    values: Tensor
    codes: Tensor

    @classmethod
    def of(cls, patch: Tensor) -> Self:
        if patch.numel() < _HEAD:
            raise ValueError("the patch is damaged: it has no head")
        count, itemsize, width = patch[:_HEAD].view(torch.int64).tolist()
        stop = _HEAD + count * itemsize
        codes = stop + stop % 2  # where they begin
        fits = itemsize in _WORDS and width in _WIDTHS and count >= 0 and codes <= patch.numel()
        if not fits or (patch.numel() - codes) % width:
            raise ValueError("the patch is damaged: its head does not fit")
        return cls(count, itemsize, patch[_HEAD:stop].view(_WORDS[itemsize]), patch[codes:].view(_WORDS[width]))


def _differing(previous: Tensor, current: Tensor) -> Tensor:
    """Positions of the elements whose bits differ (int64, ascending)."""
    per_word = 8 // current.itemsize
    whole = current.numel() // per_word * per_word
    if per_word == 1 or not _aligned(previous) or not _aligned(current):
        return torch.nonzero(previous != current).flatten()
    # Most words of 8 bytes are equal: look inside the others only.
    words = torch.nonzero(previous[:whole].view(torch.int64) != current[:whole].view(torch.int64)).flatten()
    inside = previous[:whole].view(-1, per_word)[words] != current[:whole].view(-1, per_word)[words]
    positions = (words[:, None] * per_word + torch.arange(per_word))[inside]
    rest = torch.nonzero(previous[whole:] != current[whole:]).flatten() + whole
    return torch.cat([positions, rest])


def _aligned(elements: Tensor) -> bool:
    return elements.storage_offset() * elements.itemsize % 8 == 0


def _escape(width: int) -> int:
    return (1 << 8 * width) - 1


def _num_codes(gaps: Tensor, width: int) -> int:
    return gaps.numel() + int((gaps // _escape(width)).sum())


def _coded(gaps: Tensor, width: int) -> Tensor:
    escape = _escape(width)
    ends = (gaps // escape + 1).cumsum(0)
    num_codes = int(ends[-1]) if gaps.numel() else 0
    codes = torch.full((num_codes,), escape, dtype=torch.int64)
    codes[ends - 1] = gaps % escape
    return codes.to(_WORDS[width])  # codes beyond the signed range wrap; decoding masks them


def _positions(codes: Tensor) -> Tensor:
    escape = _escape(codes.itemsize)
    steps = codes.to(torch.int64) & escape
    last = steps != escape
    return ((steps + last).cumsum(0) - 1)[last]
