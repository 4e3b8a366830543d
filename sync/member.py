"""What a process must know to take part in the publications of a run; text on the road into vLLM's workers."""

from pydantic import BaseModel, ConfigDict
from torch import device

from sync.config import SyncConfig
from sync.layout import Layout
from sync.transport import Opened, Ticket, Transport, join


class Membership(BaseModel):
    """Rank `rank` of one broadcast group: 0 is the policy's rank 0, the others are the replicas' workers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ticket: Ticket
    rank: int
    world_size: int
    layout_json: str
    config: SyncConfig
    fanout: int | None = None
    """Of the relay tree, in which each rank passes on what it receives to so many others; None for one group."""

    @property
    def layout(self) -> Layout:
        return Layout.from_json(self.layout_json)

    def at(self, rank: int) -> "Membership":
        """The same group, as another of its ranks."""
        return self.model_copy(update={"rank": rank})

    def join(self, host: str, on: device, opened: Opened | None = None) -> Transport:
        """Become this member; `host` is this process's own address, `on` the device that the wire reads or fills.

        Rank 0 passes what it has opened. Returns when all ranks are there; WireError when they are not in time.
        """
        return join(opened or self.ticket, self.rank, self.world_size, host, on, self.config.timeout_s, self.fanout)
