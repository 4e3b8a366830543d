"""Every sequence lands in one micro-batch of one rank, within the token budget, and all ranks make equally many passes.

Largest first to the least loaded (LPT): with the tens of sequences that a rank gets, its gap to a perfect balance is
already below a percent. Karmarkar-Karp's differencing comes closer in theory, but knows neither a budget per
micro-batch nor ranks that contain micro-batches, so a repair pass would undo what it wins.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from algorithms.types import Batch, GroupSummary, MicroBatch, Sample


@dataclass(slots=True)
class _Bin:
    """Sequences that share one forward pass, longest first."""

    indices: list[int] = field(default_factory=list)
    load: int = 0
    """Their tokens."""

    def add(self, index: int, num_tokens: int) -> None:
        self.indices.append(index)
        self.load += num_tokens


def _load(rank: Sequence[_Bin]) -> int:
    return sum(bin.load for bin in rank)


def build_batch(
    groups: Sequence[GroupSummary],
    advantages: Sequence[Sequence[float]],
    *,
    version: int,
    oldest_version: int,
    num_ranks: int,
    max_tokens: int,
    mask_truncated: bool,
    kl_weight: float = 0.0,
) -> Batch:
    """Over all ranks each rollout exactly once, with its advantage; the counts are over the global batch.

    With `mask_truncated` the truncated rollouts are left out of the samples and of `num_loss_tokens`, for TRL's mask
    zeroes all their tokens, but they stay in `num_sequences`, because TRL's mean over sequences counts them. Tokens
    older than `oldest_version` leave the loss and stay in every count.
    """
    samples: list[Sample] = []
    num_loss_tokens = 0
    for number, (group, advantages_G) in enumerate(zip(groups, advantages, strict=True)):
        assert len(advantages_G) == len(group.num_tokens_G), "one advantage per rollout"
        for rollout, (num_tokens, advantage) in enumerate(zip(group.num_tokens_G, advantages_G, strict=True)):
            if mask_truncated and group.truncated_G[rollout]:
                continue
            samples.append(Sample(number, rollout, num_tokens, advantage))
            num_loss_tokens += group.num_loss_tokens_G[rollout]
    packed = pack([sample.num_tokens for sample in samples], num_ranks, max_tokens)
    return Batch(
        version=version,
        ranks=tuple(tuple(MicroBatch(tuple(samples[i] for i in indices)) for indices in rank) for rank in packed),
        num_sequences=sum(len(group.num_tokens_G) for group in groups),
        num_loss_tokens=num_loss_tokens,
        oldest_version=oldest_version,
        kl_weight=kl_weight,
    )


def pack(num_tokens: Sequence[int], num_ranks: int, max_tokens: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """`[rank][micro-batch] -> indices`: each index exactly once, each micro-batch within `max_tokens`.

    `num_tokens` has one length per sequence. A sequence longer than `max_tokens` gets a micro-batch of its own. All
    ranks have the same number of micro-batches: the fewest that best-fit decreasing can fill, at least 1. Micro-batches
    are empty only when every other one holds a single sequence. The result is a pure function of the arguments; within
    a rank the fullest micro-batch comes first, so that ranks that run in step wait little for each other.
    """
    assert num_ranks > 0, f"got {num_ranks} ranks"
    assert min(num_tokens, default=1) > 0, "a sequence has at least one token"
    order = sorted(range(len(num_tokens)), key=lambda index: (-num_tokens[index], index))
    tight = _best_fit(num_tokens, order, max_tokens)
    depth = max(1, -(-len(tight) // num_ranks))
    ranks = _least_loaded(num_tokens, order, num_ranks, depth, max_tokens) or _deal(tight, num_ranks, depth)
    _fill_empty(ranks, num_tokens)
    return tuple(
        tuple(tuple(sorted(bin.indices)) for bin in sorted(rank, key=lambda bin: (-bin.load, bin.indices)))
        for rank in ranks
    )


def _best_fit(num_tokens: Sequence[int], order: Sequence[int], max_tokens: int) -> list[_Bin]:
    """Few full bins: each sequence goes to the fullest bin that still has room for it, else to a new one."""
    by_room: list[tuple[int, int]] = []  # (room left, bin), ascending
    bins: list[_Bin] = []
    for index in order:
        length = num_tokens[index]
        at = bisect_left(by_room, (length, -1))
        if at < len(by_room):
            room, number = by_room.pop(at)
        else:
            room, number = max_tokens, len(bins)
            bins.append(_Bin())
        bins[number].add(index, length)
        insort(by_room, (room - length, number))
    return bins


def _least_loaded(
    num_tokens: Sequence[int], order: Sequence[int], num_ranks: int, depth: int, max_tokens: int
) -> list[list[_Bin]] | None:
    """Balance: each sequence goes to the least loaded rank, there to the least loaded bin; None if one fits nowhere."""
    ranks = [[_Bin() for _ in range(depth)] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in order:
        length = num_tokens[index]
        for rank in sorted(range(num_ranks), key=lambda rank: (loads[rank], rank)):
            bin = min(ranks[rank], key=lambda bin: bin.load)
            if not bin.indices or bin.load + length <= max_tokens:
                bin.add(index, length)
                loads[rank] += length
                break
        else:
            return None
    return ranks


def _deal(bins: Sequence[_Bin], num_ranks: int, depth: int) -> list[list[_Bin]]:
    """The tight packing as it is: each bin, fullest first, to the least loaded rank that has fewer than `depth`."""
    ranks: list[list[_Bin]] = [[] for _ in range(num_ranks)]
    for bin in sorted(bins, key=lambda bin: (-bin.load, bin.indices)):
        open_ranks = [rank for rank in ranks if len(rank) < depth]
        min(open_ranks, key=_load).append(bin)
    for rank in ranks:
        rank.extend(_Bin() for _ in range(depth - len(rank)))
    return ranks


def _fill_empty(ranks: Sequence[list[_Bin]], num_tokens: Sequence[int]) -> None:
    """Each empty bin takes the shortest sequence of a bin with several, of its own rank or else of the heaviest one."""
    for rank in ranks:
        for empty in (bin for bin in rank if not bin.indices):
            by_choice = [rank, *sorted(ranks, key=_load, reverse=True)]
            donors = [bin for other in by_choice for bin in other if len(bin.indices) > 1]
            if not donors:
                return
            index = donors[0].indices.pop()
            donors[0].load -= num_tokens[index]
            empty.add(index, num_tokens[index])
