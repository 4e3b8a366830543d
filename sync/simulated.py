"""A broadcast down a tree in virtual time, message by message: what the closed form of `fanout.py` is held against.

Each rank has a link of its own that sends one message after the other, in the order in which they were asked for.
"""

import heapq
from dataclasses import dataclass, field

from sync.fanout import Link, Load, Tree


def simulated_time(tree: Tree, load: Load, link: Link) -> float:
    """When the last rank has the last message."""
    run = _Run(tree, load, load.message_bytes / link.bandwidth, link.latency)
    for child in tree[0]:
        run.ask(child, 0.0)
    return run.to_the_end()


@dataclass
class _Run:
    """A rank's connection to its parent is known by the rank."""

    tree: Tree
    load: Load
    message: float
    latency: float
    events: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, message, child): the child's parent asks its link for it, or, with ~message, it arrives."""

    def __post_init__(self) -> None:
        size = len(self.tree)
        self.parent = {child: rank for rank, children in enumerate(self.tree) for child in children}
        self.num_here = [0] * size
        self.num_here[0] = self.load.num_messages
        self.link_free = [0.0] * size
        self.asked = [0] * size  # messages that a rank has asked its parent for

    def to_the_end(self) -> float:
        now = 0.0
        while self.events:
            now, message, child = heapq.heappop(self.events)
            if message >= 0:
                self.send(child, message, now)
            else:
                self.arrive(child, now)
        return now

    def ask(self, child: int, now: float) -> None:
        """Have the child's next message sent, if it is there, the last one has arrived, and both are at its run."""
        parent, message = self.parent[child], self.num_here[child]
        if message == self.load.num_messages or message == self.num_here[parent] or message < self.asked[child]:
            return
        if min(self.begun(child), self.begun(parent)) < message // self.load.per_run:
            return
        self.asked[child] = message + 1
        heapq.heappush(self.events, (now, message, child))

    def begun(self, rank: int) -> int:
        """The run that the rank is at: the first that one of its children has not whole."""
        behind = [self.num_here[child] for child in self.tree[rank]]
        return min(behind, default=self.load.num_messages) // self.load.per_run

    def send(self, child: int, message: int, now: float) -> None:
        parent = self.parent[child]
        self.link_free[parent] = max(now, self.link_free[parent]) + self.message
        heapq.heappush(self.events, (self.link_free[parent] + self.latency, ~message, child))

    def arrive(self, rank: int, now: float) -> None:
        """Then the rank has something to pass on, its connection is free, and its parent may be at the next run."""
        self.num_here[rank] += 1
        parent = self.parent[rank]
        for child in (*self.tree[rank], rank, *self.tree[parent]):
            self.ask(child, now)
        if parent:
            self.ask(parent, now)
