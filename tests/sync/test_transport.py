"""All transports keep one contract: bytes arrive exact, and every operation ends by its deadline whoever dies."""

import contextlib
import json
import multiprocessing as mp
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from sync.transport import Kind, Opened, Ticket, Transport, WireError, join, open_wire

HOST = "127.0.0.1"
Case = Literal["gloo", "relay", "nccl"]
KINDS = pytest.mark.parametrize("kind", ["gloo", "relay", pytest.param("nccl", marks=pytest.mark.gpu)])
FANOUT: dict[Case, int] = {"relay": 1}
"""Three ranks in a chain: the first sends, the second passes on, the third only receives."""
DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.complex64,
]  # fmt: skip
SHAPES = [(), (1,), (3,), (7, 11), (4099,), (0,)]
LARGE = 16_000_000  # does not fit into the sockets' buffers


# What members do, in their own processes; `wires` are theirs.


def enter(
    wires: dict[str, Transport],
    name: str,
    ticket: Ticket,
    rank: int,
    world_size: int,
    timeout_s: float,
    fanout: int | None,
) -> None:
    wires[name] = join(ticket, rank, world_size, HOST, device_of(ticket.kind, rank), timeout_s, fanout)


SERVED: list[Opened] = []
"""The rendezvous that this process has opened."""


def serve(_: dict[str, Transport], kind: Kind, timeout_s: float) -> Ticket:
    SERVED[:] = [open_wire(kind, HOST, timeout_s)]
    return SERVED[0].ticket


def enter_served(
    wires: dict[str, Transport],
    name: str,
    ticket: Ticket,
    rank: int,
    world_size: int,
    timeout_s: float,
    fanout: int | None,
) -> None:
    wires[name] = join(SERVED.pop(), rank, world_size, HOST, device_of(ticket.kind, rank), timeout_s, fanout)


def carry(wires: dict[str, Transport], name: str, seed: int, root: int) -> bool:
    """Broadcast every dtype and shape; whether all of them are the root's, to the bit."""
    wire, exact = wires[name], True
    for ours, expected in zip(samples(seed if wire.rank == root else seed + 1), samples(seed), strict=True):
        tensor = ours.to(wire.device)
        wire.broadcast(tensor, root)
        exact = exact and torch.equal(bits(tensor.cpu()), bits(expected))
    return exact


def carry_large(wires: dict[str, Transport], name: str, root: int) -> bool:
    """Payloads of several slices, one after the other, and not all of whole ones; whether they are the root's."""
    wire, exact = wires[name], True
    for num_bytes in (LARGE + 3, 4 * 2**20 + 1, 4 * 2**20, LARGE):
        expected = torch.randint(0, 256, (num_bytes,), generator=torch.Generator().manual_seed(num_bytes)).byte()
        tensor = expected.clone() if wire.rank == root else torch.zeros_like(expected)
        tensor = tensor.to(wire.device)
        wire.broadcast(tensor, root)
        exact = exact and torch.equal(tensor.cpu(), expected)
    return exact


def go_on(wires: dict[str, Transport], name: str) -> str:
    """Broadcast large tensors until it fails; returns the reason and raises when later operations do not fail too."""
    tensor = torch.zeros(LARGE, dtype=torch.uint8, device=wires[name].device)
    try:
        while True:
            wires[name].broadcast(tensor)
    except WireError as error:
        started = time.monotonic()
        with pytest.raises(WireError):
            wires[name].broadcast(tensor)
        assert time.monotonic() - started < 0.2
        return error.reason


def go_on_until_aborted(wires: dict[str, Transport], name: str, after_s: float) -> str:
    timer = threading.Timer(after_s, wires[name].abort)
    timer.start()
    reason = go_on(wires, name)
    timer.join()
    return reason


def leave(wires: dict[str, Transport], name: str) -> None:
    wires.pop(name).close()


def held(wires: dict[str, Transport]) -> tuple[int, int, int]:
    """File descriptors, kernel threads and Python threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(threading.enumerate())


def device_of(kind: Case, rank: int) -> torch.device:
    return torch.device("cuda", rank) if kind == "nccl" else torch.device("cpu")


def root_of(kind: Case, root: int) -> int:
    return 0 if kind == "relay" else root


def ticket_kind(case: Case) -> Kind:
    return "nccl" if case == "nccl" else "gloo"


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def samples(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for dtype in DTYPES:
        for shape in SHAPES:
            size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
            payload = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), generator=generator)
            made.append(payload.to(torch.uint8).view(dtype).reshape(shape))
    return made


def live(pipe: Connection) -> None:
    torch.set_num_threads(1)
    wires: dict[str, Transport] = {}
    with contextlib.suppress(EOFError):
        while True:
            action, arguments = pipe.recv()
            started = time.monotonic()
            try:
                answer = action(wires, *arguments)
            except WireError as error:
                answer = error
            pipe.send((answer, time.monotonic() - started))


class Member:
    """A process that does one thing at a time; `start` and `answer` are apart, so that several members work at once."""

    def __init__(self, context: Any) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=live, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, action: Callable[..., Any], *arguments: object) -> None:
        self.pipe.send((action, arguments))

    def answer(self, timeout_s: float = 15.0) -> tuple[Any, float]:
        """The result, or the WireError, and the seconds that it took."""
        assert self.pipe.poll(timeout_s), "the member is late"
        answer: tuple[Any, float] = self.pipe.recv()
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@pytest.fixture(scope="module")
def context() -> Any:
    made = mp.get_context("forkserver")  # members start in milliseconds: the server has imported all this already
    made.set_forkserver_preload([__name__, "sync.gloo"])
    return made


@pytest.fixture
def members(context: Any) -> Iterator[list[Member]]:
    three = [Member(context) for _ in range(3)]
    all_do(three, held)  # they are up: deadlines begin now
    yield three
    for member in three:
        member.end()


def opened(kind: Case, num_gpus: int, timeout_s: float = 10.0) -> Opened:
    if kind != "nccl":
        return open_wire("gloo", HOST, timeout_s)
    pytest.importorskip("cupy")
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    return open_wire("nccl", HOST, timeout_s)


def form(kind: Case, members: list[Member], name: str = "wire", timeout_s: float = 10.0) -> Opened:
    """All members join one group; what is returned must be held until then."""
    rendezvous = opened(kind, len(members))
    for rank, member in enumerate(members):
        member.start(enter, name, rendezvous.ticket, rank, len(members), timeout_s, FANOUT.get(kind))
    assert [member.answer()[0] for member in members] == [None] * len(members)
    return rendezvous


def all_do(members: list[Member], action: Callable[..., Any], *arguments: object) -> list[Any]:
    for member in members:
        member.start(action, *arguments)
    return [member.answer()[0] for member in members]


@KINDS
@pytest.mark.parametrize("root", [0, 2])
def test_every_dtype_and_size_arrives_bit_exact(kind: Case, root: int, members: list[Member]) -> None:
    _rendezvous = form(kind, members)
    assert all_do(members, carry, "wire", 7, root_of(kind, root)) == [True, True, True]


@KINDS
def test_one_process_is_in_several_groups(kind: Case, members: list[Member]) -> None:
    held_open = [form(kind, members, "a"), form(kind, members[1:], "b"), form(kind, members[::-1], "c")]
    for seed in range(2):
        assert all_do(members[1:], carry, "b", seed, root_of(kind, 1)) == [True, True]
        assert all_do(members, carry, "a", seed, root_of(kind, 1)) == [True] * 3
        assert all_do(members, carry, "c", seed, 0) == [True] * 3
    assert all_do(members, leave, "a") == [None] * 3
    assert all_do(members, carry, "c", 3, root_of(kind, 2)) == [True] * 3
    assert len(held_open) == 3


@KINDS
@pytest.mark.parametrize("size", [2, 3])
def test_large_payloads_arrive_bit_exact(kind: Case, size: int, members: list[Member]) -> None:
    """Between two members gloo's go in slices."""
    _rendezvous = form(kind, members[:size])
    for root in (0, root_of(kind, 1)):
        assert all_do(members[:size], carry_large, "wire", root) == [True] * size


@pytest.mark.cluster
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_left_of_two_is_released(blow: signal.Signals, victim: int, members: list[Member]) -> None:
    """In the middle of a payload that goes in slices; and the process can form a group with another."""
    timeout_s = 2.0
    _rendezvous = form("gloo", members[:2], timeout_s=timeout_s)
    for member in members[:2]:
        member.start(go_on, "wire")
    time.sleep(0.3)
    pid, survivor = members[victim].process.pid, members[1 - victim]
    assert pid is not None
    os.kill(pid, blow)
    struck = time.monotonic()
    reason = survivor.answer(timeout_s + 5.0)[0]
    assert time.monotonic() - struck < timeout_s + 1.0
    assert reason == ("peer gone" if blow == signal.SIGKILL else "deadline passed")
    assert all_do([survivor], leave, "wire") == [None]
    _second = form("gloo", [survivor, members[2]])
    assert all_do([survivor, members[2]], carry_large, "wire", 0) == [True, True]


@pytest.mark.cluster
@KINDS
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_survivors_of_a_dead_member_are_released_and_form_a_new_group(
    kind: Case, blow: signal.Signals, victim: int, members: list[Member]
) -> None:
    timeout_s = 2.0
    _rendezvous = form(kind, members, timeout_s=timeout_s)
    for member in members:
        member.start(go_on, "wire")
    time.sleep(0.3)
    pid = members[victim].process.pid
    assert pid is not None
    os.kill(pid, blow)
    struck = time.monotonic()
    survivors = [member for member in members if member is not members[victim]]
    reasons = [survivor.answer(timeout_s + 5.0)[0] for survivor in survivors]
    released_s = time.monotonic() - struck
    print(f"{blow.name} of rank {victim}: released after {released_s:.2f} s, {reasons}")
    assert released_s < timeout_s + 1.0
    assert "peer gone" in reasons if blow == signal.SIGKILL and kind != "nccl" else "deadline passed" in reasons
    assert all_do(survivors, leave, "wire") == [None, None]
    _second = form(kind, survivors)
    assert all_do(survivors, carry, "wire", 11, root_of(kind, 1)) == [True, True]


@pytest.mark.cluster
@KINDS
def test_who_never_joins_is_not_waited_for(kind: Case, members: list[Member]) -> None:
    rendezvous = opened(kind, 3)
    for rank, member in enumerate(members[:2]):
        member.start(enter, "wire", rendezvous.ticket, rank, 3, 1.0, FANOUT.get(kind))
    for member in members[:2]:
        error, seconds = member.answer()
        assert isinstance(error, WireError)
        assert error.reason == "deadline passed"
        assert seconds < 2.0
    _rendezvous = form(kind, members[:2])
    assert all_do(members[:2], carry, "wire", 5, 0) == [True, True]


def test_a_store_that_does_not_answer_is_not_waited_for() -> None:
    started = time.monotonic()
    with pytest.raises(WireError, match=r"rank 1, reaching the store at 127\.0\.0\.1:9"):
        join(Ticket("gloo", f"{HOST}:9"), 1, 2, HOST, torch.device("cpu"), 0.5)
    assert time.monotonic() - started < 1.5


@pytest.mark.cluster
@KINDS
@pytest.mark.parametrize("busy", [True, False], ids=["mid-payload", "waiting"])
def test_an_abort_from_another_thread_releases_at_once(kind: Case, busy: bool, members: list[Member]) -> None:
    rendezvous = opened(kind, 2)
    members[0].start(enter, "wire", rendezvous.ticket, 1, 2, 3.0, FANOUT.get(kind))
    wire = join(rendezvous, 0, 2, HOST, device_of(kind, 0), 3.0, FANOUT.get(kind))
    assert members[0].answer()[0] is None
    if busy:
        members[0].start(go_on, "wire")
    aborted: list[float] = []
    timer = threading.Timer(0.3, lambda: (aborted.append(time.monotonic()), wire.abort(), wire.abort()))
    timer.start()
    reason = go_on({"wire": wire}, "wire")
    assert time.monotonic() - aborted[0] < 1.0
    assert reason == "aborted"
    timer.join()
    if busy:
        reason, seconds = members[0].answer()
        assert reason == ("async error" if kind == "nccl" else "peer gone")
        assert seconds < 0.3 + 1.0
    wire.close()
    wire.close()


@pytest.mark.cluster
@KINDS
def test_rebuilds_after_failures_leak_nothing(kind: Case, members: list[Member]) -> None:
    """Every member is a process that does nothing else, so not one descriptor or thread may be left."""
    timeout_s = 2.0
    size = 3 if kind == "relay" else 2  # one that passes on is among three
    root, *peers = members[:size]
    opened(kind, size)  # skips where there are no GPUs

    def rebuild() -> None:
        root.start(serve, ticket_kind(kind), timeout_s)
        ticket = root.answer()[0]
        for rank, member in enumerate((root, *peers)):
            action = enter_served if member is root else enter
            member.start(action, "wire", ticket, rank, size, timeout_s, FANOUT.get(kind))
        assert [member.answer()[0] for member in (root, *peers)] == [None] * size
        root.start(go_on_until_aborted, "wire", 0.03)  # mid-payload, the worst moment
        for peer in peers:
            peer.start(go_on, "wire")
        assert root.answer()[0] == "aborted"
        assert all(isinstance(peer.answer()[0], str) for peer in peers)
        assert all_do([root, *peers], leave, "wire") == [None] * size

    def settled() -> list[tuple[int, int, int]]:
        time.sleep(timeout_s + 1.5)  # gloo's own time-out
        return all_do([root, *peers], held)

    rebuild()
    before = settled()
    for _ in range(20 if kind == "relay" else 50):
        rebuild()
    after = settled()
    for now, then in zip(after, before, strict=True):
        assert all(ours <= theirs for ours, theirs in zip(now, then, strict=True)), (before, after)


def test_tickets_and_errors_travel() -> None:
    ticket = Ticket("gloo", "10.0.0.1:1234")
    assert Ticket(**json.loads(json.dumps(asdict(ticket)))) == ticket == pickle.loads(pickle.dumps(ticket))
    error = pickle.loads(pickle.dumps(WireError(2, "broadcast of 5 bytes from rank 0", "peer gone", "rank 1: reset")))
    assert str(error) == "rank 2, broadcast of 5 bytes from rank 0: peer gone (rank 1: reset)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing")
def test_nccl_without_a_gpu_says_so() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        open_wire("nccl", HOST, 1.0)


# One GPU is enough for these: NCCL refuses two members on one.


@pytest.fixture
def alone() -> Iterator[Transport]:
    rendezvous = opened("nccl", 1)
    wire = join(rendezvous, 0, 1, HOST, torch.device("cuda", 0), 1.0)
    yield wire
    wire.close()


def occupy_the_gpu() -> None:
    torch.cuda._sleep(6_000_000_000)  # about 3 s on torch's current stream, which a broadcast must wait for


@pytest.mark.gpu
def test_nccl_alone_carries_bf16(alone: Transport) -> None:
    assert carry({"wire": alone}, "wire", 3, 0)
    tensor = torch.randn(1001, dtype=torch.bfloat16, device="cuda")
    expected = tensor.clone()
    alone.broadcast(tensor)
    assert torch.equal(tensor, expected)


@pytest.mark.gpu
def test_nccl_alone_keeps_its_deadline(alone: Transport) -> None:
    occupy_the_gpu()
    started = time.monotonic()
    with pytest.raises(WireError, match="deadline passed"):
        alone.broadcast(torch.zeros(8, device="cuda"))
    assert time.monotonic() - started < 1.0 + 1.0 + 0.5  # deadline, settling, polling


@pytest.mark.gpu
def test_nccl_alone_aborts(alone: Transport) -> None:
    occupy_the_gpu()
    threading.Timer(0.2, alone.abort).start()
    with pytest.raises(WireError, match="aborted"):
        alone.broadcast(torch.zeros(8, device="cuda"))
    with pytest.raises(WireError, match="aborted"):
        alone.broadcast(torch.zeros(8, device="cuda"))


@pytest.mark.gpu
def test_nccl_gives_up_on_a_peer_that_never_joins() -> None:
    rendezvous = opened("nccl", 1)
    started = time.monotonic()
    with pytest.raises(WireError, match="joining 2 ranks: deadline passed"):
        join(rendezvous, 0, 2, HOST, torch.device("cuda", 0), 2.0)
    assert time.monotonic() - started < 3.0
