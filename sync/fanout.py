"""A relay tree is used where it brings a version to all rollout workers much sooner than one group. Pure: trees, times.

The model: each machine sends over one link, one message after the other, B bytes a second. A message of s bytes holds
the link for t = s / B and has arrived alpha later; the two ends of a connection then turn to its next message (gloo's
broadcasts are synchronous). Machines send while they receive. A version of S bytes is n messages in runs of m: a member
turns to its next run (a bucket, one broadcast) when all its children have this one.

A tree whose nodes pass every message to their children in order, c of them below the root and at most c' elsewhere, has
brought everything everywhere after

    T = (n - 1) p  +  max over ranks, sum over the hops from the root, of (j t + alpha)  +  (n/m - 1) q
        p = max(c t, t + alpha)                                  the root's time for a message
        q = max(c t + alpha - p, (c' + 1) t + 2 alpha - p)       lost between runs; the first term where c' = 0

(a hop is to a j-th child). It is what `simulated.py` finds step by step: exactly for one run, nearly for several. Its
parts bound what a way can do; with many messages and little latency the first is left, the copies that a link carries:

    any way at all              S / B + alpha: the policy's link carries every byte once, and the last one has to arrive
    chain, k = 1                (S / B) (1 + (W - 1) / n) + (n + W - 1) alpha: close to that for few workers W, but the
                                last one waits for W hops; least at n = sqrt((W - 1) S / (B alpha))
    tree of depth D, k > 1      at least k S / B + alpha; at most (S / B) (k + k (D - 1) / n) + D alpha while
                                alpha <= (k - 1) t: k times the bound, but only about log_k(W) hops
    one gloo group              a binomial tree of whole buckets: at least ceil(log2(W + 1)) S / B + alpha

Workers on one machine share its link, and what they pass to each other does not load it: then c is the most copies that
a machine sends or receives, j counts all that the machine has to send, and T is an estimate.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sync.config import SyncConfig

Tree = Sequence[Sequence[int]]
"""The children of each rank, in the order in which they are sent to; parents come before children."""
SLICE_BYTES = 4 * 2**20
"""A relay's message."""
LATENCY = 0.25
"""Latency of such a message over its time on the link, where nobody knows the link; measured between two processes of
one machine: 0.15 to 0.2."""
_MAX_FANOUT = 8
_WORTH = 0.75
"""More hops are more places to fail at: a deeper tree must take less than this share of a shallower one's time."""


@dataclass(frozen=True, slots=True)
class Link:
    """What each machine sends over. In any unit of time, so that ratios need none."""

    latency: float
    """alpha, for each message."""
    bandwidth: float = 1.0
    """Bytes in a unit of time."""


@dataclass(frozen=True, slots=True)
class Load:
    """A version as it is cut: `num_messages` of equal size, `per_run` of them in one broadcast."""

    num_messages: int
    message_bytes: float
    per_run: int = 1


def cut(num_bytes: int, run_bytes: float, message_bytes: float) -> Load:
    """A version in broadcasts of about `run_bytes`, each in messages of about `message_bytes`."""
    per_run = max(1, round(min(run_bytes, num_bytes) / message_bytes))
    num_messages = per_run * max(1, round(num_bytes / run_bytes))
    return Load(num_messages, num_bytes / num_messages, per_run)


def relay_tree(world_size: int, fanout: int) -> Tree:
    """Rank r passes on to k r + 1 ... k r + k."""
    return [
        range(min(fanout * rank + 1, world_size), min(fanout * rank + fanout + 1, world_size))
        for rank in range(world_size)
    ]


def group_tree(world_size: int) -> Tree:
    """What gloo's broadcast from rank 0 does: rank r passes on to r + 2^i for every 2^i above r."""
    powers = [1 << i for i in range((world_size - 1).bit_length())]
    return [[rank + power for power in powers if rank < power < world_size - rank] for rank in range(world_size)]


def time_of(tree: Tree, load: Load, link: Link, machines: Sequence[Hashable] | None = None) -> float:
    """T above, for the ranks on these machines; each has one of its own where none are given."""
    machines = range(len(tree)) if machines is None else machines
    message, latency = load.message_bytes / link.bandwidth, link.latency
    sent: Counter[Hashable] = Counter()
    received: Counter[Hashable] = Counter()
    arrival = [0.0] * len(tree)
    for rank, children in enumerate(tree):
        for child in children:
            arrival[child] = arrival[rank] + latency
            if machines[child] != machines[rank]:
                sent[machines[rank]] += 1
                received[machines[child]] += 1
                arrival[child] += sent[machines[rank]] * message
    first = sent[machines[0]]
    copies = max([first, *sent.values(), *received.values()])
    period = max(copies * message, message + latency)
    lost = copies * message + latency - period
    inner = [sent[machines[rank]] for rank, children in enumerate(tree) if rank > 0 and children]
    if inner:
        lost = max(lost, (max(inner) + 1) * message + 2 * latency - period)
    num_runs = load.num_messages // load.per_run
    return (load.num_messages - 1) * period + max(arrival) + (num_runs - 1) * lost


def relative_time(machines: Sequence[Hashable], num_bytes: int, bucket_bytes: float, fanout: int | None) -> float:
    """T over S / B, for policy rank 0 and then every rollout worker on these machines: of one group, or of a relay."""
    link = Link(latency=LATENCY * SLICE_BYTES)
    if fanout is None:
        tree, load = group_tree(len(machines)), cut(num_bytes, bucket_bytes, bucket_bytes)
    else:
        tree, load = relay_tree(len(machines), fanout), cut(num_bytes, bucket_bytes, SLICE_BYTES)
    return time_of(tree, load, link, machines) / num_bytes


def choose(machines: Sequence[Hashable], num_bytes: int, bucket_bytes: float) -> int | None:
    """The best fan-out, or None for one group; always that where all are on one machine, which no link slows down."""
    if len(set(machines)) == 1:
        return None
    best, shortest = None, relative_time(machines, num_bytes, bucket_bytes, None)
    for fanout in range(min(_MAX_FANOUT, len(machines) - 1), 0, -1):
        time = relative_time(machines, num_bytes, bucket_bytes, fanout)
        if time < _WORTH * shortest:
            best, shortest = fanout, time
    return best


def fanout_of(config: SyncConfig, machines: Sequence[Hashable], num_bytes: int | None) -> int | None:
    """What `join` is to be given, on all ranks: machines[0] is policy rank 0's, the others the workers' by rank.

    A version of unknown size is counted as one bucket, which makes a relay's pipeline look as short as it can be.
    """
    if config.fanout != "auto":
        return config.fanout
    if config.transport == "nccl":
        return None
    bucket_bytes = config.bucket_mb * 2**20
    return choose(machines, round(bucket_bytes) if num_bytes is None else num_bytes, bucket_bytes)
