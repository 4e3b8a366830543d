"""No replica swaps to a version before every replica holds all of its bytes, verified.

announce -> stream -> verify (all replicas) -> swap (pause, load, resume; all replicas) -> committed
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from actors.deadline import within
from actors.errors import RunError, last_line
from actors.policy_group import PolicyGroup
from actors.rollout import Swapped
from sync.config import SyncConfig
from sync.sender import Sent

# What is waited beyond the workers' own deadlines, whose messages name the cause better than ours.
_GRACE_S = 10.0


@dataclass(slots=True)
class Publisher:
    """One broadcast group: policy rank 0 and every worker of every replica."""

    policy: PolicyGroup
    replicas: Sequence[ray.actor.ActorHandle]
    workers_per_replica: int
    dtype: str
    """The dtype that the replicas hold, in which the weights travel."""
    config: SyncConfig
    drain_timeout_s: float = 0.0
    """How long running requests may take to finish before a swap, when they are not swapped under."""
    committed: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last publication, under `sync/*`."""

    async def connect(self) -> None:
        """Plan the layout and form the broadcast group."""
        timeout_s = self.config.timeout_s
        layout = await self.policy.plan_weights(self.dtype, self.config.bucket_mb)
        opening: Awaitable[tuple[str, int]] = self.policy.ranks[0].open_store.remote(timeout_s)
        store = await _answer(opening, timeout_s, "opening the weight store")
        size, group = 1 + len(self.replicas) * self.workers_per_replica, "weights-0"
        calls = [rank.join_weights.remote(layout, group, size, timeout_s) for rank in self.policy.ranks]
        calls += [replica.join_weights.remote(store, group, size, layout, timeout_s) for replica in self.replicas]
        await _answer(asyncio.gather(*calls), timeout_s + _GRACE_S, "forming the weight group")

    async def publish(self, version: int) -> None:
        """Every replica serves `version` when this returns; RunError names the phase and the replica that failed."""
        assert self.committed is None or version == self.committed + 1, "versions are published one by one"
        started = time.perf_counter()
        await self._phase("announcing", version, [r.begin_receive.remote(version) for r in self.replicas])
        sent: Sent = await self.policy.send_weights(self.config.timeout_s + _GRACE_S)
        assert sent.version == version
        streamed = time.perf_counter()
        await self._phase("verifying", version, [r.verify.remote(version, sent.digests) for r in self.replicas])
        swaps = [r.swap.remote(version, self.config.timeout_s) for r in self.replicas]
        swapped: list[Swapped] = await self._phase("swapping to", version, swaps, self.drain_timeout_s)
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

    async def _phase(
        self, phase: str, version: int, calls: Sequence[Awaitable[Any]], extra_s: float = 0.0
    ) -> list[Any]:
        """The answers of all replicas, in order."""
        timeout_s = self.config.timeout_s + extra_s + _GRACE_S
        answers = [_answer(call, timeout_s, f"replica {n}, {phase} version {version}") for n, call in enumerate(calls)]
        return await asyncio.gather(*answers)


async def _answer(call: Awaitable[Any], timeout_s: float, what: str) -> Any:
    try:
        return await within(timeout_s, call, what)
    except RayError as error:
        raise RunError(f"{what}: {last_line(error)}") from error
