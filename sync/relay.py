"""A tensor runs down a tree of links slice by slice, and when one link fails the whole tree is released.

Rank r receives from rank (r - 1) // k and passes on to k r + 1 ... k r + k: nobody, rank 0 included, sends more than k
copies or has more than k + 1 peers, however many ranks there are. Every link is a gloo group of two, all of them on one
store. (Gloo's own broadcast makes rank 0 send a copy for each doubling, and connects every rank with every other.)

The tensor itself is the buffer: a slice is passed on while the next ones arrive, to each child at the child's own pace.
A failure on one link aborts the rank's other links; its neighbours see that as a peer that is gone, and so on.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import TCPStore

from sync.fanout import SLICE_BYTES
from sync.gloo import GlooGroup, reason_of, words_of
from sync.transport import Reason, WireError, as_bytes, remaining_s, within

_SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class _Link:
    """A wire to a neighbour in the tree; the upper end is the wire's rank 0."""

    neighbour: int
    wire: GlooGroup


class RelayGroup:
    """A member of the tree: `broadcast` sends from rank 0 to all others."""

    def __init__(
        self,
        store: TCPStore,
        group: str,
        rank: int,
        world_size: int,
        host: str,
        timeout_s: float,
        fanout: int,
        *,
        join_s: float | None = None,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        """Returns when the whole tree has joined; WireError when it has not within `join_s`, or else `timeout_s`.

        `fanout` (k) and `slice_bytes` must be the same on all ranks.
        """
        assert fanout >= 1, f"a relay passes on to at least one, not {fanout}"
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device("cpu")
        self._timeout_s = timeout_s
        self._slice_bytes = slice_bytes
        self._failure: tuple[Reason, str] | None = None
        self._changed = threading.Condition()  # a slice has arrived, or it has failed
        self._num_here = 0
        self._busy: tuple[Future[None], ...] = ()
        self._links: tuple[_Link, ...] = ()
        deadline = time.monotonic() + (timeout_s if join_s is None else join_s)
        self._join(store, group, host, fanout, deadline)
        self._threads = ThreadPoolExecutor(max(1, len(self._links)), thread_name_prefix="relay")

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Send (rank 0) or fill and pass on (others) `tensor`; WireError when a neighbour is gone or it is too late."""
        assert root == 0, f"a relay sends from rank 0, not from {root}"
        payload = as_bytes(tensor, self.device)
        operation = f"broadcast of {payload.numel()} bytes from rank 0"
        if self._failure is None and payload.numel() > 0:
            self._carry(payload.split(self._slice_bytes))
        if self._failure is not None:
            raise WireError(self.rank, operation, *self._failure)

    def abort(self) -> None:
        """Release an operation in progress within a moment, refuse later ones, and close all connections."""
        self._fail("aborted", "")

    def close(self) -> None:
        """Free sockets and threads; what a gloo group keeps after a failure in mid-payload, each link keeps as long."""
        with self._changed:
            interrupted = any(not future.done() for future in self._busy)
            self._failure = self._failure or ("closed", "")
            self._changed.notify_all()
        for link in self._links if interrupted else ():
            link.wire.abort()
        self._threads.shutdown()
        for link in self._links:
            link.wire.close()
        self._links = ()

    def _join(self, store: TCPStore, group: str, host: str, fanout: int, deadline: float) -> None:
        links: list[_Link] = []
        try:
            for upper, lower in _ends(self.rank, self.world_size, fanout):
                end, neighbour = (0, lower) if self.rank == upper else (1, upper)
                name = f"{group}-{upper}-{lower}"
                wire = GlooGroup(store, name, end, 2, host, self._timeout_s, remaining_s(deadline))
                links.append(_Link(neighbour, wire))
            _meet(store, group, self.world_size, deadline)
        except (WireError, RuntimeError, TimeoutError) as error:
            for link in links:
                link.wire.close()
            told = (error.reason, error.detail) if isinstance(error, WireError) else (reason_of(error), words_of(error))
            raise WireError(self.rank, f"joining {self.world_size} ranks", *told) from None
        self._links = tuple(links)

    def _carry(self, slices: Sequence[Tensor]) -> None:
        """All links at once, each on a thread; leaves what went wrong in `_failure`."""
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            if self._failure is not None:
                return
            self._num_here = len(slices) if self.rank == 0 else 0
            busy = {self._start(link, slices): link.neighbour for link in self._links}
            self._busy = tuple(busy)
        late = wait(busy, remaining_s(deadline)).not_done
        if late:
            # Children that still wait for what our parent has not sent are not to blame.
            waited_for = min(busy[future] for future in late)
            self._fail("deadline passed", f"rank {waited_for}: {self._timeout_s:g} s")
            wait(busy, _SETTLE_S)

    def _start(self, link: _Link, slices: Sequence[Tensor]) -> Future[None]:
        return self._threads.submit(self._pass_on if link.neighbour > self.rank else self._take, link, slices)

    def _take(self, link: _Link, slices: Sequence[Tensor]) -> None:
        for index, part in enumerate(slices):
            if not self._move(link, part):
                return
            with self._changed:
                self._num_here = index + 1
                self._changed.notify_all()

    def _pass_on(self, link: _Link, slices: Sequence[Tensor]) -> None:
        for index, part in enumerate(slices):
            if not self._comes(index) or not self._move(link, part):
                return

    def _comes(self, index: int) -> bool:
        """Wait for a slice; false after a failure, because below us any bytes would be taken for the sender's."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_here > index or self._failure is not None, self._timeout_s)
            return self._num_here > index and self._failure is None

    def _move(self, link: _Link, part: Tensor) -> bool:
        """Whether the slice went over the link; a link that fails takes the others with it."""
        try:
            link.wire.broadcast(part)
        except WireError as error:
            # The wire counts its own two ends; here ranks are the tree's.
            detail = error.detail.removeprefix(f"rank {1 - link.wire.rank}: ")
            self._fail(error.reason, f"rank {link.neighbour}: {detail}")
            return False
        return True

    def _fail(self, reason: Reason, detail: str) -> None:
        """The first failure is the cause of all that follow."""
        with self._changed:
            if self._failure is not None:
                return
            self._failure = reason, detail
            self._changed.notify_all()
        for link in self._links:
            link.wire.abort()


def _ends(rank: int, world_size: int, fanout: int) -> Iterator[tuple[int, int]]:
    """The rank's links as (upper, lower) ranks, in an order that lets a deep tree join all over at once.

    Links below ranks of even depth come first, then the others: no link waits for more than one rank's worth of others.
    """
    depth, above = 0, rank
    while above > 0:
        above = (above - 1) // fanout
        depth += 1
    up = [((rank - 1) // fanout, rank)] if rank > 0 else []
    first = fanout * rank + 1
    down = [(rank, child) for child in range(first, min(first + fanout, world_size))]
    yield from (down + up if depth % 2 == 0 else up + down)


def _meet(store: TCPStore, group: str, world_size: int, deadline: float) -> None:
    """Returns when every rank has come here; RuntimeError or TimeoutError when one has not by then."""
    counted, complete = f"{group}-joined", f"{group}-complete"

    def meet() -> None:
        if store.add(counted, 1) == world_size:
            store.set(complete, "")
        store.wait([complete], timedelta(seconds=max(0.001, remaining_s(deadline))))

    within(meet, lambda _: None, remaining_s(deadline), "relay-join")
