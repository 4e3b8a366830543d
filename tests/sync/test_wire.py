"""Sender and staging over a real gloo group, each in its own process: versions arrive whole, or the error names why."""

import contextlib
import multiprocessing as mp
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection

import pytest
import torch

from sync.gloo import GlooGroup, open_store
from sync.layout import Layout, Parameter, plan_layout
from sync.receiver import Staging
from sync.sender import Sender

HOST = "127.0.0.1"
LAYOUT = plan_layout([Parameter(f"w{i}", "float32", (64, i + 1)) for i in range(20)], 4096)


def weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        placed.parameter.name: torch.randn(placed.parameter.shape, generator=generator)
        for bucket in LAYOUT.buckets
        for placed in bucket.tensors
    }


def receive(port: int, rank: int, world_size: int, versions: int, layout: str, result: Connection) -> None:
    group = GlooGroup.join(HOST, port, "test", rank, world_size, HOST, 20.0)
    staging = Staging(Layout.from_json(layout), group)
    for version in range(versions):
        staging.begin(version)
        staging.verify(version, result.recv(), 20.0)
        expected = weights(version)
        result.send(all(torch.equal(tensor, expected[name]) for name, tensor in staging.tensors()))


def vanish(port: int) -> None:
    GlooGroup.join(HOST, port, "test", 1, 2, HOST, 20.0)


@contextlib.contextmanager
def gather_from(version: int, names: tuple[str, ...]) -> Iterator[Mapping[str, torch.Tensor]]:
    yield {name: tensor for name, tensor in weights(version).items() if name in names}


def test_three_versions_reach_two_receivers_whole() -> None:
    store = open_store(HOST, 20.0)
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in (1, 2):
        ours, theirs = context.Pipe()
        process = context.Process(target=receive, args=(store.port, rank, 3, 3, LAYOUT.to_json(), theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    sender = Sender(LAYOUT, GlooGroup(store, "test", 0, 3, HOST, 20.0))
    for version in range(3):
        sent = sender.send(version, lambda names, version=version: gather_from(version, names))
        assert sent.num_bytes == LAYOUT.num_bytes
        assert len(sent.digests) == len(LAYOUT.buckets)
        for pipe in pipes:
            pipe.send(list(sent.digests))
        assert [pipe.poll(20.0) and pipe.recv() for pipe in pipes] == [True, True]
    for process in processes:
        process.join(20.0)
        assert process.exitcode == 0


def test_a_receiver_that_vanishes_fails_the_send_within_the_deadline() -> None:
    store = open_store(HOST, 20.0)
    process = mp.get_context("spawn").Process(target=vanish, args=(store.port,))
    process.start()
    sender = Sender(LAYOUT, GlooGroup(store, "test", 0, 2, HOST, 5.0))
    process.join(20.0)
    started = time.perf_counter()

    def send_on() -> None:
        for version in range(50):  # the first sends may fit into the socket's buffer
            sender.send(version, lambda names, version=version: gather_from(version, names))

    with pytest.raises(RuntimeError):
        send_on()
    assert time.perf_counter() - started < 10.0


class _Replay:
    """A group whose broadcast delivers given bytes, to damage one bucket on purpose."""

    def __init__(self, payloads: list[torch.Tensor]) -> None:
        self.payloads = iter(payloads)

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.copy_(next(self.payloads))


def test_a_damaged_bucket_is_named() -> None:
    sent: list[torch.Tensor] = []

    class Tap:
        def broadcast(self, tensor: torch.Tensor) -> None:
            sent.append(tensor.clone())

    sender = Sender(LAYOUT, Tap())  # type: ignore[arg-type]
    digests = list(sender.send(0, lambda names: gather_from(0, names)).digests)
    sent[1][3] ^= 4
    staging = Staging(LAYOUT, _Replay(sent))  # type: ignore[arg-type]
    staging.begin(0)
    with pytest.raises(RuntimeError, match="bucket 1 of"):
        staging.verify(0, digests, 5.0)
