"""A broadcast group over TCP in which every operation ends or fails by its deadline.

It stands on its own TCPStore and ProcessGroupGloo, apart from torch.distributed's default group, so one process can
be in several (DeepSpeed's among them) and a group can be made anew after a failure.
"""

from datetime import timedelta
from typing import Any, Self

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore


class GlooGroup:
    """Rank 0 sends, every other rank receives; all ranks make the same calls in the same order."""

    def __init__(self, store: TCPStore, group: str, rank: int, world_size: int, host: str, timeout_s: float) -> None:
        self.rank = rank
        self._store = store  # closes with the last reference
        timeout = timedelta(seconds=timeout_s)
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        # Bind to the address that the others reach; the default resolves the host name, which containers often lack.
        options._devices = [ProcessGroupGloo.create_device(hostname=host)]
        self._group: Any = ProcessGroupGloo(PrefixStore(group, store), rank, world_size, options)
        self._timeout = timeout

    @classmethod
    def join(
        cls, store_host: str, store_port: int, group: str, rank: int, world_size: int, host: str, timeout_s: float
    ) -> Self:
        """Join as a receiver; `host` is this process's own address.

        Raises torch.distributed.DistStoreError or DistNetworkError when the others do not come in time.
        """
        store = TCPStore(store_host, store_port, is_master=False, timeout=timedelta(seconds=timeout_s))
        return cls(store, group, rank, world_size, host, timeout_s)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send (rank 0) or fill (others) `tensor`; raises RuntimeError when a peer is gone or the deadline passes."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        self._group.broadcast([tensor], options).wait(self._timeout)


def open_store(host: str, timeout_s: float) -> TCPStore:
    """The rendezvous of a group, served by this process on a free port of `host`."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
