"""A policy and replicas without engines: their sides of a publication, over the real wire and real Ray.

A replica can be told to fail at any point of a version: to be killed or stopped by its kernel, to flip a bit, or to be
slow.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor

from actors.policy import node_ip
from actors.rollout import Swapped
from sync.layout import parameters_of, plan_layout
from sync.member import Membership
from sync.sender import Sender, Sent
from sync.staging import CPU, Staging
from sync.transport import Kind, Ticket, Transport, open_wire

SHAPES = {f"layer.{index}": torch.Size((40, 50)) for index in range(8)}
BUCKET_MB = 0.01  # a layer of 8 kB each


def weights(version: int) -> dict[str, Tensor]:
    """What the policy holds at a version."""
    generator = torch.Generator().manual_seed(version)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


class LightPolicy:
    """Rank 0, whose version the test sets."""

    def __init__(self) -> None:
        self.version = 0

    def step(self) -> None:
        self.version += 1

    def plan_weights(self, dtype: str, bucket_mb: float) -> str:
        return plan_layout(parameters_of(SHAPES.items(), dtype), int(bucket_mb * 2**20)).to_json()

    def open_wire(self, transport: Kind, timeout_s: float) -> Ticket:
        self._opened = open_wire(transport, node_ip(), timeout_s)
        return self._opened.ticket

    def join_weights(self, membership: Membership) -> None:
        config = membership.config
        self._wire = membership.join(node_ip(), CPU, self._opened)
        self._sender = Sender(membership.layout, self._wire, delta=config.delta, full_every=config.full_every)

    def abort_weights(self) -> None:
        self._wire.abort()

    def send_weights(self) -> Sent:
        return self._sender.send(self.version, self._gather)

    @contextlib.contextmanager
    def _gather(self, names: tuple[str, ...]) -> Iterator[Mapping[str, Tensor]]:
        held = weights(self.version)
        yield {name: held[name] for name in names}

    def num_files(self) -> int:
        return len(os.listdir("/proc/self/fd"))


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when: at a phase, or at a bucket of the stream."""

    kind: Literal["kill", "stop", "flip", "slow", "spoil"]
    at: Literal["join", "announce", "verify", "swap"] | int
    version: int = 1

    def strike(self) -> None:
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "slow":
                time.sleep(0.5)
            case "flip" | "spoil":
                pass  # what it does is done where the bytes are


class FaultyWire:
    """A transport that strikes before a bucket arrives, or flips one of its bits after."""

    def __init__(self, wire: Transport) -> None:
        self._wire = wire
        self.fault: Fault | None = None
        self.num_broadcasts = 0

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        fault = self.fault if self.fault is not None and self.num_broadcasts == self.fault.at else None
        self.num_broadcasts += 1
        if fault is not None:
            fault.strike()
        self._wire.broadcast(tensor, root)
        if fault is not None and fault.kind == "flip":
            tensor.view(torch.uint8)[3] ^= 16

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)


class LightReplica:
    """`RolloutActor` without an engine."""

    def __init__(self, number: int, fault: Fault | None = None) -> None:
        self.number = number
        self.fault = fault
        self.version: int | None = None
        self.model: dict[str, Tensor] = {}
        self._staging: Staging | None = None
        self.sampling = False

    async def start(self) -> str:
        """There is no engine to build."""
        return node_ip()

    async def ping(self) -> None:
        """It answers."""

    async def rest(self) -> None:
        """The GPU is the policy's; the weights are gone."""
        self.sampling, self.model = False, {}

    async def forget(self) -> None:
        self.version = None

    async def join_weights(self, first: Membership) -> None:
        self._strike("join")
        if self._staging is not None:
            self._staging.close()
        self._wire = FaultyWire(await asyncio.to_thread(first.join, node_ip(), CPU))
        wire: Any = self._wire
        self._staging = Staging(first.layout, wire, delta=first.config.delta)

    async def begin_receive(self, version: int) -> None:
        assert self._staging is not None
        assert self.version is None or version > self.version, "versions never go back"
        self._coming = version
        self._strike("announce")
        self._wire.fault = self.fault if self.fault is not None and self.fault.version == version else None
        self._wire.num_broadcasts = 0
        self._staging.begin(version)

    async def receive(self, version: int, timeout_s: float) -> None:
        assert self._staging is not None
        while not self._staging.ready():  # noqa: ASYNC110  other threads' work
            await asyncio.sleep(0.005)

    async def verify(self, version: int, digests: tuple[str, ...]) -> None:
        assert self._staging is not None
        self._strike("verify")
        await asyncio.to_thread(self._staging.verify, version, list(digests), 1.0)

    async def swap(self, version: int, timeout_s: float, hold: bool) -> Swapped:
        assert self._staging is not None
        self._strike("swap")
        self.model = {name: tensor.clone() for name, tensor in self._staging.tensors()}
        if self.fault is not None and self.fault.kind == "spoil" and self.fault.version == version:
            self.model["layer.3"][0, 0] += 1.0  # after all digests were found right
        self._staging.commit()
        self.version = version
        self.sampling = not hold
        return Swapped(0.0, 0.0)

    async def resume_generation(self) -> Swapped:
        assert not self.sampling, "only a swap that was held is resumed"
        self.sampling = True
        return Swapped(0.0, 0.0)

    async def checksum(self) -> str:
        state = xxhash.xxh3_64()
        for tensor in self.model.values():
            state.update(tensor.numpy().data)
        return state.hexdigest()

    async def holds(self) -> tuple[int | None, bool]:
        """Its version, and whether its weights are that version's to the bit."""
        if self.version is None:
            return None, not self.model
        expected: Any = weights(self.version)
        return self.version, self.sampling and all(torch.equal(self.model[name], expected[name]) for name in SHAPES)

    async def close(self) -> None:
        if self._staging is not None:
            self._staging.close()

    async def num_files(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def _strike(self, phase: str) -> None:
        coming = getattr(self, "_coming", -1) + (phase == "join")
        if self.fault is not None and self.fault.at == phase and coming == self.fault.version:
            self.fault.strike()
