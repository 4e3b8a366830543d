"""A version is published whole or not at all: nobody swaps before everybody holds every byte of it, verified.

announce -> stream -> verify (all replicas) -> swap (pause, load, resume; all replicas) -> committed
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.deadline import within
from actors.policy_group import PolicyGroup
from actors.rollout import Swapped
from sync.config import SyncConfig
from sync.sender import Sent


@dataclass(slots=True)
class Publisher:
    """One broadcast group: policy rank 0 and every worker of every replica."""

    policy: PolicyGroup
    replicas: Sequence[ray.actor.ActorHandle]
    workers_per_replica: int
    dtype: str
    """The dtype that the replicas hold, in which the weights travel."""
    config: SyncConfig
    committed: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last publication, under `sync/*`."""

    async def connect(self) -> None:
        """Plan the layout and form the broadcast group."""
        timeout_s = self.config.timeout_s
        layout = await self.policy.plan_weights(self.dtype, self.config.bucket_mb)
        opening: Awaitable[tuple[str, int]] = self.policy.ranks[0].open_store.remote(timeout_s)
        store = await within(timeout_s, opening, "opening the weight store")
        size, group = 1 + len(self.replicas) * self.workers_per_replica, "weights-0"
        calls = [rank.join_weights.remote(layout, group, size, timeout_s) for rank in self.policy.ranks]
        calls += [replica.join_weights.remote(store, group, size, layout, timeout_s) for replica in self.replicas]
        await within(timeout_s, asyncio.gather(*calls), "forming the weight group")

    async def publish(self, version: int) -> None:
        """Every replica serves `version` when this returns; raises naming the phase that failed."""
        assert self.committed is None or version == self.committed + 1, "versions are published one by one"
        started = time.perf_counter()
        await self._phase("announcing", version, [r.begin_receive.remote(version) for r in self.replicas])
        sent: Sent = await self.policy.send_weights(self.config.timeout_s)
        assert sent.version == version
        streamed = time.perf_counter()
        await self._phase("verifying", version, [r.verify.remote(version, sent.digests) for r in self.replicas])
        swaps = [r.swap.remote(version, self.config.timeout_s) for r in self.replicas]
        swapped: list[Swapped] = await self._phase("swapping", version, swaps)
        self.committed = version
        self.metrics = {
            "weights/version": float(version),
            "sync/bytes": float(sent.num_bytes),
            "sync/stream_s": streamed - started,
            "sync/pause_s": max(s.pause_s for s in swapped),
            "sync/swap_s": max(s.swap_s for s in swapped),
            "sync/total_s": time.perf_counter() - started,
            "sync/replicas": float(len(self.replicas)),
        }

    async def _phase(self, phase: str, version: int, calls: Sequence[ray.ObjectRef]) -> list[Any]:
        return await within(self.config.timeout_s, asyncio.gather(*calls), f"{phase} version {version}")
