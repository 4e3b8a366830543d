"""A tree of seven, two below each: whoever dies, all others are released, and nobody takes for whole what is not."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sync.transport import Transport, WireError, join, open_wire
from tests.sync.test_transport import HOST, LARGE, Member, all_do, carry, enter, leave
from tests.sync.test_transport import context as context  # a fixture

SIZE, FANOUT = 7, 2
ROOT, INNER, LEAF = 0, 1, 6


def number(wires: dict[str, Transport]) -> tuple[int, int, str]:
    """Broadcasts full of 1, of 2, and so on until one fails: how many came whole, who says so, why no more did."""
    wire, done = wires["wire"], 0
    tensor = torch.empty(LARGE, dtype=torch.uint8)
    try:
        while True:
            tensor.fill_(done % 250 + 1 if wire.rank == ROOT else 255)
            wire.broadcast(tensor)
            assert bool((tensor == done % 250 + 1).all()), "a broadcast that has returned is whole"
            done += 1
    except WireError as error:
        return done, error.rank, str(error)


def num_connections(wires: dict[str, Transport]) -> int:
    """Established TCP connections of this process."""
    mine = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    table = Path("/proc/self/net/tcp").read_text() + Path("/proc/self/net/tcp6").read_text()
    rows = [line.split() for line in table.splitlines()]
    established = "01"
    return sum(row[3] == established and f"socket:[{row[9]}]" in mine for row in rows)


@pytest.fixture
def members(context: Any) -> Iterator[list[Member]]:
    seven = [Member(context) for _ in range(SIZE)]
    all_do(seven, num_connections)
    yield seven
    for member in seven:
        member.end()


def form(members: list[Member], timeout_s: float) -> Any:
    rendezvous = open_wire("gloo", HOST, timeout_s)
    for rank, member in enumerate(members):
        member.start(enter, "wire", rendezvous.ticket, rank, len(members), timeout_s, FANOUT)
    assert [member.answer()[0] for member in members] == [None] * len(members)
    return rendezvous


def test_what_passes_through_many_hands_is_exact_and_nobody_has_many_neighbours(members: list[Member]) -> None:
    before = all_do(members, num_connections)
    _rendezvous = form(members, 10.0)
    assert all_do(members, carry, "wire", 5, ROOT) == [True] * SIZE
    more = [after - was for after, was in zip(all_do(members, num_connections), before, strict=True)]
    store = 1
    assert more == [2 + store, 3 + store, 3 + store, *[1 + store] * 4]
    assert all_do(members, leave, "wire") == [None] * SIZE


@pytest.mark.cluster
@pytest.mark.parametrize("victim", [INNER, LEAF])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_death_anywhere_releases_the_whole_tree(blow: signal.Signals, victim: int, members: list[Member]) -> None:
    timeout_s = 4.0
    _rendezvous = form(members, timeout_s)
    for member in members:
        member.start(number)
    time.sleep(0.5)
    pid = members[victim].process.pid
    assert pid is not None
    os.kill(pid, blow)
    struck = time.monotonic()
    survivors = [member for member in members if member is not members[victim]]
    answers = [survivor.answer(timeout_s + 5.0)[0] for survivor in survivors]
    released_s = time.monotonic() - struck
    print(f"{blow.name} of rank {victim}: released after {released_s:.2f} s, {answers}")
    assert released_s < timeout_s + 1.0
    assert [rank for _, rank, _ in answers] == [rank for rank in range(SIZE) if rank != victim]
    assert any(f"(rank {victim}: " in why for _, _, why in answers), answers  # a neighbour names it
    assert all_do(survivors, leave, "wire") == [None] * len(survivors)
    _second = form(survivors, 10.0)
    assert all_do(survivors, carry, "wire", 11, ROOT) == [True] * len(survivors)


def test_one_that_aborts_releases_the_whole_tree_soon(members: list[Member]) -> None:
    rendezvous = open_wire("gloo", HOST, 20.0)
    for rank, member in enumerate(members[1:], 1):
        member.start(enter, "wire", rendezvous.ticket, rank, SIZE, 20.0, FANOUT)
    wire = join(rendezvous, ROOT, SIZE, HOST, torch.device("cpu"), 20.0, FANOUT)
    assert [member.answer()[0] for member in members[1:]] == [None] * (SIZE - 1)
    for member in members[1:]:
        member.start(number)  # all of them wait for us
    time.sleep(0.2)
    wire.abort()
    aborted = time.monotonic()
    for member in members[1:]:
        assert "peer gone" in member.answer()[0][2]
    assert time.monotonic() - aborted < 2.0
    with pytest.raises(WireError, match="rank 0, broadcast of 3 bytes from rank 0: aborted"):
        wire.broadcast(torch.zeros(3, dtype=torch.uint8))
    wire.close()
    wire.close()


def test_one_that_closes_in_mid_payload_is_released_and_so_is_the_other(members: list[Member]) -> None:
    rendezvous = open_wire("gloo", HOST, 20.0)
    members[0].start(enter, "wire", rendezvous.ticket, 1, 2, 20.0, FANOUT)
    wire = join(rendezvous, ROOT, 2, HOST, torch.device("cpu"), 20.0, FANOUT)
    assert members[0].answer()[0] is None
    timer = threading.Timer(0.3, wire.close)
    timer.start()
    started = time.monotonic()
    with pytest.raises(WireError, match="closed"):
        wire.broadcast(torch.zeros(LARGE, dtype=torch.uint8))  # nobody takes it
    assert time.monotonic() - started < 2.0
    timer.join()
    assert "peer gone" in all_do(members[:1], number)[0][2]


def test_a_relay_of_one_has_nobody_to_send_to() -> None:
    wire = join(open_wire("gloo", HOST, 5.0), 0, 1, HOST, torch.device("cpu"), 5.0, FANOUT)
    wire.broadcast(torch.ones(5))
    wire.close()
    with pytest.raises(WireError, match="closed"):
        wire.broadcast(torch.ones(5))
