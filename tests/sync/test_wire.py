"""Sender and staging over a real gloo group, each in its own process: versions arrive whole, or the error names why."""

import contextlib
import multiprocessing as mp
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from sync.gloo import GlooGroup, open_store
from sync.layout import Layout, Parameter, plan_layout
from sync.sender import Sender, Sent
from sync.staging import Staging
from sync.transport import Ticket, join, open_wire

HOST = "127.0.0.1"
LAYOUT = plan_layout([Parameter(f"w{i}", "float32", (64, i + 1)) for i in range(20)], 4096)


MATRIX = Parameter("matrix", "bfloat16", (256, 256))
CHANGING = plan_layout([MATRIX, *(Parameter(f"w{i}", "bfloat16", (40, i + 1)) for i in range(20))], 65536)


def changing(version: int) -> dict[str, torch.Tensor]:
    """Weights of which few change from one version to the next, and some tensors not at all."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        placed.parameter.name: torch.randn(placed.parameter.shape, generator=generator).bfloat16()
        for bucket in CHANGING.buckets
        for placed in bucket.tensors
    }
    for step in range(1, version + 1):
        for name in ("matrix", "w3"):
            flat = tensors[name].view(-1)
            flat[step::50] += 1.0
    return tensors


def weights(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    return {
        placed.parameter.name: torch.randn(placed.parameter.shape, generator=generator)
        for bucket in LAYOUT.buckets
        for placed in bucket.tensors
    }


def receive_changes(ticket: Ticket, rank: int, fanout: int | None, layout: str, result: Connection) -> None:
    group = join(ticket, rank, 3, HOST, torch.device("cpu"), 20.0, fanout)
    staging = Staging(Layout.from_json(layout), group, delta=True)
    versions = result.recv()
    for version in range(versions):
        staging.begin(version)
        staging.verify(version, result.recv(), 20.0)
        staging.commit()
        expected = changing(version)
        result.send(all(torch.equal(tensor, expected[name]) for name, tensor in staging.tensors()))


def receive(ticket: Ticket, rank: int, fanout: int | None, layout: str, result: Connection) -> None:
    group = join(ticket, rank, 3, HOST, torch.device("cpu"), 20.0, fanout)
    staging = Staging(Layout.from_json(layout), group)
    versions = result.recv()
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


@pytest.mark.cluster
@pytest.mark.parametrize("fanout", [None, 1])
@pytest.mark.parametrize("delta", [False, True])
def test_versions_reach_two_receivers_whole(delta: bool, fanout: int | None) -> None:
    layout, versions = (CHANGING, 7) if delta else (LAYOUT, 3)
    opened = open_wire("gloo", HOST, 20.0)
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in (1, 2):
        ours, theirs = context.Pipe()
        arguments = (opened.ticket, rank, fanout, layout.to_json(), theirs)
        process = context.Process(target=receive_changes if delta else receive, args=arguments)
        process.start()
        ours.send(versions)
        pipes.append(ours)
        processes.append(process)
    group = join(opened, 0, 3, HOST, torch.device("cpu"), 20.0, fanout)
    sender = Sender(layout, group, delta=delta, full_every=4)
    gather = changing_from if delta else gather_from
    for version in range(versions):
        sent = sender.send(version, lambda names, version=version: gather(version, names))
        if not delta:
            assert sent.num_bytes == layout.num_bytes
        assert len(sent.digests) == len(layout.buckets)
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

    device = torch.device("cpu")

    def __init__(self, payloads: list[torch.Tensor]) -> None:
        self.payloads = iter(payloads)

    def broadcast(self, tensor: torch.Tensor) -> None:
        tensor.copy_(next(self.payloads))


def test_a_damaged_bucket_is_named() -> None:
    sent: list[torch.Tensor] = []

    class Tap:
        device = torch.device("cpu")

        def broadcast(self, tensor: torch.Tensor) -> None:
            sent.append(tensor.clone())

    sender = Sender(LAYOUT, Tap())  # type: ignore[arg-type]
    digests = list(sender.send(0, lambda names: gather_from(0, names)).digests)
    sent[1][3] ^= 4
    staging = Staging(LAYOUT, _Replay(sent))  # type: ignore[arg-type]
    staging.begin(0)
    with pytest.raises(RuntimeError, match="bucket 1 of"):
        staging.verify(0, digests, 5.0)


class Script:
    """A group that writes down what rank 0 sends."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def broadcast(self, tensor: torch.Tensor) -> None:
        self.sent.append(tensor.clone())

    def drain(self) -> list[torch.Tensor]:
        sent, self.sent = self.sent, []
        return sent


class Pair:
    """A sender of changes and a staging that receives what the sender's wire has carried."""

    def __init__(self, full_every: int = 100) -> None:
        self.script = Script()
        self.sender = Sender(CHANGING, self.script, delta=True, full_every=full_every)  # type: ignore[arg-type]
        self.staging = Staging(CHANGING, _Replay([]), delta=True)  # type: ignore[arg-type]

    def send(self, version: int, full: bool = False) -> tuple[Sent, list[torch.Tensor]]:
        sent = self.sender.send(version, lambda names: changing_from(version, names), full)
        return sent, self.script.drain()

    def receive(self, sent: Sent, payloads: list[torch.Tensor]) -> None:
        self.staging._group.payloads = iter(payloads)  # type: ignore[attr-defined]
        self.staging.begin(sent.version)
        self.staging.verify(sent.version, list(sent.digests), 5.0)

    def holds(self, version: int) -> bool:
        expected = changing(version)
        return all(torch.equal(tensor, expected[name]) for name, tensor in self.staging.tensors())


@contextlib.contextmanager
def changing_from(version: int, names: tuple[str, ...]) -> Iterator[Mapping[str, torch.Tensor]]:
    yield {name: tensor for name, tensor in changing(version).items() if name in names}


def test_only_changes_travel_and_every_so_often_everything() -> None:
    pair = Pair(full_every=3)
    num_bytes = []
    for version in range(7):
        sent, payloads = pair.send(version)
        assert sent.num_bytes == sum(payload.numel() for payload in payloads)
        pair.receive(sent, payloads)
        pair.staging.commit()
        assert pair.holds(version)
        num_bytes.append(sent.num_bytes)
        assert (sent.num_changed is None) == (version % 3 == 0)
    full = CHANGING.num_bytes + 24 * len(CHANGING.buckets)
    assert [size == full for size in num_bytes] == [True, False, False, True, False, False, True]
    assert max(num_bytes[1], num_bytes[2]) < full / 10


def test_a_damaged_patch_is_caught_and_the_next_full_version_heals() -> None:
    pair = Pair()
    pair.receive(*pair.send(0))
    pair.staging.commit()
    sent, payloads = pair.send(1)
    patch = next(payload for payload in payloads if payload.numel() > 24)
    patch[40] ^= 1  # inside a value
    with pytest.raises(RuntimeError, match="arrived damaged"):
        pair.receive(sent, payloads)
    assert pair.holds(0), "the committed version is whole"
    with pytest.raises(RuntimeError, match="a change of version 1, but 0 is held"):
        pair.receive(*pair.send(2))
    assert pair.holds(0)
    pair.receive(*pair.send(3, full=True))
    pair.staging.commit()
    assert pair.holds(3)
    pair.receive(*pair.send(4))
    assert pair.holds(4)


@pytest.mark.parametrize("full", [True, False])
def test_a_verified_version_that_is_not_committed_is_forgotten(full: bool) -> None:
    pair = Pair()
    pair.receive(*pair.send(0))
    pair.staging.commit()
    pair.receive(*pair.send(1, full))
    assert pair.holds(1)
    with pytest.raises(RuntimeError, match="but 0 is held here"):
        pair.receive(*pair.send(2))
    assert pair.holds(0)


def test_a_version_that_did_not_go_out_is_followed_by_a_full_one() -> None:
    pair = Pair()
    pair.receive(*pair.send(0))
    pair.staging.commit()

    def fail(names: tuple[str, ...]) -> Any:
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        pair.sender.send(1, fail)
    sent, payloads = pair.send(2)
    assert sent.num_changed is None
    pair.receive(sent, payloads)
    assert pair.holds(2)


def test_a_tensor_as_it_travels_is_not_copied() -> None:
    seen: list[int] = []

    class Look(Script):
        def broadcast(self, tensor: torch.Tensor) -> None:
            seen.append(tensor.data_ptr())

    tensors = changing(0)
    sender = Sender(CHANGING, Look())  # type: ignore[arg-type]
    sender.send(0, lambda names: contextlib.nullcontext({name: tensors[name] for name in names}))
    assert seen[0] == tensors["matrix"].data_ptr()


def test_gathered_memory_is_kept_until_it_is_sent_and_no_longer() -> None:
    """All ranks open and close the same contexts in the same order, rank 0 not before the bucket's bytes are out."""
    orders: list[list[str]] = []
    for group in (Script(), None):
        order: list[str] = []

        @contextlib.contextmanager
        def gather(names: tuple[str, ...], order: list[str] = order) -> Iterator[Mapping[str, torch.Tensor]]:
            order.append(f"open {names[0]}")
            gathered = {name: tensor.clone() for name, tensor in weights(0).items() if name in names}
            yield gathered
            for tensor in gathered.values():
                tensor.zero_()
            order.append(f"close {names[0]}")

        sent = Sender(LAYOUT, group).send(0, gather)  # type: ignore[arg-type]
        orders.append(order)
        if group is not None:
            staging = Staging(LAYOUT, _Replay(group.drain()))  # type: ignore[arg-type]
            staging.begin(0)
            staging.verify(0, list(sent.digests), 5.0)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 2 * len(LAYOUT.buckets)


def test_sending_leaves_gradients_as_they_were() -> None:
    @contextlib.contextmanager
    def gather(names: tuple[str, ...]) -> Iterator[Mapping[str, torch.Tensor]]:
        with torch.no_grad():  # two of these overlap
            yield {name: tensor for name, tensor in weights(0).items() if name in names}

    Sender(LAYOUT, Script()).send(0, gather)  # type: ignore[arg-type]
    assert torch.is_grad_enabled()


def test_a_broken_wire_does_not_keep_the_other_ranks_waiting_in_a_gather() -> None:
    """Under ZeRO-3 every rank takes part in every gather: rank 0 too, when it has nothing to send them to any more."""
    gathered: list[tuple[str, ...]] = []

    class Broken(Script):
        def broadcast(self, tensor: torch.Tensor) -> None:
            raise RuntimeError("rank 2 is gone")

    @contextlib.contextmanager
    def gather(names: tuple[str, ...]) -> Iterator[Mapping[str, torch.Tensor]]:
        gathered.append(names)
        yield {name: tensor for name, tensor in weights(0).items() if name in names}

    with pytest.raises(RuntimeError, match="rank 2 is gone"):
        Sender(LAYOUT, Broken()).send(0, gather)  # type: ignore[arg-type]
    assert gathered == [bucket.names for bucket in LAYOUT.buckets]
