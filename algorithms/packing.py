"""Every sequence lands in one micro-batch of one rank, within the token budget, and all ranks make equally many passes.

The ranks are balanced by what their sequences cost (`algorithms/costs.py`), by Karmarkar and Karp's differencing; the
passes of a rank by least loaded first, which knows the budget. A pass computes the prompt of a group once for as many
of its rollouts as it has (`algorithms/packed.py`), so they belong together as far as the ranks stay balanced.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from algorithms.costs import SequenceCosts
from algorithms.partition import partition
from algorithms.types import Batch, GroupSummary, MicroBatch, Sample

_NO_COSTS = SequenceCosts()
_GOOD_ENOUGH = 1.02
"""Of the time that it would take if every prompt were computed once and no rank ever waited."""

Packed = tuple[tuple[tuple[int, ...], ...], ...]
"""`[rank][micro-batch] -> indices`."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """What is to be packed; the sequences of a group are neighbours and begin alike."""

    num_tokens: Sequence[int]
    costs: Sequence[float]
    group: Sequence[int]
    beginning: Sequence[float]
    """How much of a sequence's cost a pass pays once for all of its group: the same in all of it."""

    def cost(self, indices: Sequence[int]) -> float:
        """Of a pass over these."""
        beginnings = {self.group[index]: self.beginning[index] for index in indices}
        return sum(self.costs[index] - self.beginning[index] for index in indices) + sum(beginnings.values())

    def time(self, packed: Packed) -> float:
        """When ranks wait for each other after every pass."""
        return sum(max(self.cost(micro) for micro in micros) for micros in zip(*packed, strict=True))

    def units(self, size: int, max_tokens: int) -> list[list[int]]:
        """Neighbours of one group, at most `size` of them, and no more than a pass has room for; at least one."""
        units: list[list[int]] = []
        room = 0
        for index, (length, group) in enumerate(zip(self.num_tokens, self.group, strict=True)):
            room -= length
            if not units or self.group[units[-1][0]] != group or len(units[-1]) == size or room < 0:
                units.append([])
                room = max_tokens - length
            units[-1].append(index)
        return units


@dataclass(slots=True)
class _Bin:
    """Sequences that share one forward pass, longest first."""

    indices: list[int] = field(default_factory=list)
    num_tokens: int = 0
    cost: float = 0.0

    def add(self, index: int, num_tokens: int, cost: float) -> None:
        self.indices.append(index)
        self.num_tokens += num_tokens
        self.cost += cost


def build_batch(
    groups: Sequence[GroupSummary],
    advantages: Sequence[Sequence[float | None]],
    *,
    version: int,
    oldest_version: int,
    num_ranks: int,
    max_tokens: int,
    mask_truncated: bool,
    costs: SequenceCosts = _NO_COSTS,
    kl_weight: float = 0.0,
) -> Batch:
    """Over all ranks each rollout exactly once, with its advantage; the counts are over the global batch.

    A rollout whose advantage is None is left out, of the samples and of `num_loss_tokens`.

    With `mask_truncated` the truncated rollouts are left out of the samples and of `num_loss_tokens`, for TRL's mask
    zeroes all their tokens, but they stay in `num_sequences`, because TRL's mean over sequences counts them. Tokens
    older than `oldest_version` leave the loss and stay in every count.
    """
    samples: list[Sample] = []
    costs_S: list[float] = []
    prompts_S: list[float] = []
    num_loss_tokens = 0
    for number, (group, advantages_G) in enumerate(zip(groups, advantages, strict=True)):
        assert len(advantages_G) == len(group.num_tokens_G), "one advantage per rollout"
        for rollout, (num_tokens, advantage) in enumerate(zip(group.num_tokens_G, advantages_G, strict=True)):
            if advantage is None or (mask_truncated and group.truncated_G[rollout]):
                continue
            samples.append(Sample(number, rollout, num_tokens, advantage))
            costs_S.append(costs.of(num_tokens, group.num_loss_tokens_G[rollout]))
            prompts_S.append(costs.shared(group.num_prompt_tokens))
            num_loss_tokens += group.num_loss_tokens_G[rollout]
    sequences = Sequences([s.num_tokens for s in samples], costs_S, [s.group for s in samples], prompts_S)
    packed = pack_sharing(sequences, num_ranks, max_tokens)
    return Batch(
        version=version,
        ranks=tuple(tuple(MicroBatch(tuple(samples[i] for i in indices)) for indices in rank) for rank in packed),
        num_sequences=sum(len(group.num_tokens_G) for group in groups),
        num_loss_tokens=num_loss_tokens,
        oldest_version=oldest_version,
        kl_weight=kl_weight,
    )


def with_token_advantages(batch: Batch, by_place: Mapping[tuple[int, int], NDArray[np.float32]]) -> Batch:
    """The batch with an advantage for each loss token of the rollouts, by group and rollout, that have them.

    The one of the whole rollout is their mean then, for the eye alone.
    """

    def told(sample: Sample) -> Sample:
        advantages_L = by_place.get((sample.group, sample.rollout))
        if advantages_L is None:
            return sample
        return replace(sample, advantage=float(advantages_L.mean()), advantages_L=advantages_L)

    ranks = tuple(tuple(MicroBatch(tuple(map(told, micro.samples))) for micro in rank) for rank in batch.ranks)
    return replace(batch, ranks=ranks)


def pack_sharing(sequences: Sequences, num_ranks: int, max_tokens: int) -> Packed:
    """As `pack`, of whole groups, each as if it were one sequence, or of halves of them, and so on: whatever is done
    soonest.

    The budget counts every token of each sequence, as if nothing were shared. Indices ascend within a micro-batch, so
    that those of a group are neighbours there, too.
    """
    sizes = Counter(sequences.group)
    beginnings = zip(sequences.group, sequences.beginning, strict=True)
    least = (sum(sequences.costs) - sum((1 - 1 / sizes[group]) * cost for group, cost in beginnings)) / num_ranks
    candidates: list[tuple[float, Packed]] = []
    size = max(sizes.values(), default=1)
    while size and not (candidates and candidates[-1][0] <= _GOOD_ENOUGH * least):
        units = sequences.units(size, max_tokens)
        num_tokens = [sum(sequences.num_tokens[index] for index in unit) for unit in units]
        of_units = pack(num_tokens, num_ranks, max_tokens, [sequences.cost(unit) for unit in units])
        packed = tuple(tuple(tuple(i for unit in micro for i in units[unit]) for micro in rank) for rank in of_units)
        candidates.append((sequences.time(packed), packed))
        size //= 2
    return min(candidates, key=lambda candidate: candidate[0])[1]


def pack(num_tokens: Sequence[int], num_ranks: int, max_tokens: int, costs: Sequence[float] | None = None) -> Packed:
    """Each index exactly once, each micro-batch within `max_tokens`.

    `num_tokens` has one length per sequence, and `costs` what it costs to compute; None: its tokens. A sequence longer
    than `max_tokens` gets a micro-batch of its own. All ranks have the same number of micro-batches: the fewest that
    best-fit decreasing can fill, at least 1, if balanced ranks fit into so many; else one more, or unbalanced ranks,
    whichever is done sooner. The result is a pure function of the arguments; within a rank the most costly micro-batch
    comes first, so that ranks that run in step wait little for each other.
    """
    assert num_ranks > 0, f"got {num_ranks} ranks"
    assert min(num_tokens, default=1) > 0, "a sequence has at least one token"
    costs = num_tokens if costs is None else costs
    assert len(costs) == len(num_tokens), "one cost per sequence"
    order = sorted(range(len(num_tokens)), key=lambda index: (-num_tokens[index], index))
    tight = _best_fit(num_tokens, costs, order, max_tokens)
    depth = max(1, -(-len(tight) // num_ranks))
    shares = [sorted(share, key=lambda index: (-num_tokens[index], index)) for share in partition(costs, num_ranks)]
    ranks = _balanced(num_tokens, costs, shares, depth, max_tokens)
    if ranks is None:
        one_more = _balanced(num_tokens, costs, shares, depth + 1, max_tokens)
        dealt = _deal(tight, num_ranks, depth)
        ranks = min((candidate for candidate in (one_more, dealt) if candidate is not None), key=_time)
    return tuple(tuple(tuple(sorted(bin.indices)) for bin in _in_turn(rank)) for rank in ranks)


def _best_fit(num_tokens: Sequence[int], costs: Sequence[float], order: Sequence[int], max_tokens: int) -> list[_Bin]:
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
        bins[number].add(index, length, costs[index])
        insort(by_room, (room - length, number))
    return bins


def _balanced(
    num_tokens: Sequence[int], costs: Sequence[float], shares: Sequence[Sequence[int]], depth: int, max_tokens: int
) -> list[list[_Bin]] | None:
    """Each rank's share, longest sequence first, in `depth` bins; None if one does not fit into them."""
    ranks: list[list[_Bin]] = []
    for share in shares:
        bins = _least_loaded(num_tokens, costs, share, depth, max_tokens)
        if bins is None:
            bins = _best_fit(num_tokens, costs, share, max_tokens)
            if len(bins) > depth:
                return None
        ranks.append(bins + [_Bin() for _ in range(depth - len(bins))])
    return ranks


def _least_loaded(
    num_tokens: Sequence[int], costs: Sequence[float], share: Sequence[int], depth: int, max_tokens: int
) -> list[_Bin] | None:
    """Each sequence in the least costly bin that has room for it; None if one fits nowhere."""
    bins = [_Bin() for _ in range(depth)]
    for index in share:
        length = num_tokens[index]
        open_bins = [bin for bin in bins if not bin.indices or bin.num_tokens + length <= max_tokens]
        if not open_bins:
            return None
        min(open_bins, key=lambda bin: bin.cost).add(index, length, costs[index])
    return bins


def _deal(bins: Sequence[_Bin], num_ranks: int, depth: int) -> list[list[_Bin]]:
    """The tight packing as it is: each bin, most costly first, to the least loaded rank with fewer than `depth`."""
    ranks: list[list[_Bin]] = [[] for _ in range(num_ranks)]
    for bin in sorted(bins, key=lambda bin: (-bin.cost, bin.indices)):
        open_ranks = [rank for rank in ranks if len(rank) < depth]
        min(open_ranks, key=lambda rank: sum(bin.cost for bin in rank)).append(bin)
    for rank in ranks:
        rank.extend(_Bin() for _ in range(depth - len(rank)))
    return ranks


def _in_turn(rank: Sequence[_Bin]) -> list[_Bin]:
    return sorted(rank, key=lambda bin: (-bin.cost, bin.indices))


def _time(ranks: Sequence[Sequence[_Bin]]) -> float:
    """What the passes cost when ranks wait for each other after every one."""
    return sum(max(bin.cost for bin in bins) for bins in zip(*map(_in_turn, ranks), strict=True))
