"""A team whose ranks are threads of one process, over gloo."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import HashStore, ProcessGroup, ProcessGroupGloo, Store

from actors.model.team import Team

TIMEOUT = timedelta(seconds=60)


def gloo(store: Store, rank: int, size: int) -> ProcessGroup:
    """A group of its own, apart from torch.distributed's default one."""
    group: Any = ProcessGroup(store, rank, size)
    kind: Any = ProcessGroup.BackendType.GLOO
    group._set_default_backend(kind)
    group._register_backend(torch.device("cpu"), kind, ProcessGroupGloo(store, rank, size, TIMEOUT))
    return group


def in_a_team(size: int, use: Callable[[Team], Any]) -> list[Any]:
    """What `use` makes of each rank of the team."""
    store = HashStore()

    def of(rank: int) -> Any:
        torch.set_num_threads(1)
        return use(Team(rank, size, gloo(store, rank, size)))

    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(of, range(size)))
