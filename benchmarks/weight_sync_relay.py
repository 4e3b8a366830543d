"""Fan-out to many workers: a thousand in virtual time, and a few real ones on this machine, relay against group.

Processes of one machine share its memory and cores: there is no link that a relay could spare, so the real comparison
says what passing on costs, not what it gains.
"""

import multiprocessing as mp
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import torch
from torch.distributed import TCPStore

from sync.fanout import SLICE_BYTES, Link, cut, group_tree, relay_tree, time_of
from sync.gloo import GlooGroup, open_store, reach_store
from sync.relay import RelayGroup
from sync.simulated import simulated_time
from sync.transport import Transport

HOST = "127.0.0.1"
TIMEOUT_S = 60.0
BUCKET_BYTES = 64 * 2**20

NUM_WORKERS, NUM_BYTES, LATENCY_S = 1024, 15 * 10**9, 0.3e-3
LINKS = (12.5e9, 50e9)
"""Bytes/s: 100 and 400 Gbit/s."""

NUM_RANKS, FANOUT = 6, 2
ROADS = ("relay", "group")


@dataclass(frozen=True, slots=True)
class Predicted:
    """A version of NUM_BYTES for NUM_WORKERS on a machine each, in seconds of virtual time."""

    bytes_per_s: float
    fanout: int
    relay_s: float
    closed_form_s: float
    group_s: float
    bound_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the same bucket by both roads, in turns, until every receiver has said that it has it."""

    num_bytes: int
    relay_s: float
    group_s: float
    num_runs: int


def predict(bytes_per_s: float) -> Predicted:
    """The best fan-out for slices that are on the link at least as long as their latency."""
    link = Link(LATENCY_S, bytes_per_s)
    load = cut(NUM_BYTES, BUCKET_BYTES, max(SLICE_BYTES, LATENCY_S * bytes_per_s))
    trees = {fanout: relay_tree(NUM_WORKERS + 1, fanout) for fanout in range(1, 9)}
    fanout = min(trees, key=lambda fanout: time_of(trees[fanout], load, link))
    return Predicted(
        bytes_per_s=bytes_per_s,
        fanout=fanout,
        relay_s=simulated_time(trees[fanout], load, link),
        closed_form_s=time_of(trees[fanout], load, link),
        group_s=simulated_time(group_tree(NUM_WORKERS + 1), cut(NUM_BYTES, BUCKET_BYTES, BUCKET_BYTES), link),
        bound_s=NUM_BYTES / bytes_per_s + LATENCY_S,
    )


def measure(num_runs: int = 15) -> Measured:
    """A bucket to the other ranks, all processes of this machine; the first of each road is not counted."""
    context, store = mp.get_context("spawn"), open_store(HOST, TIMEOUT_S)
    pipes: list[Connection] = []
    for rank in range(1, NUM_RANKS):
        ours, theirs = context.Pipe()
        context.Process(target=_receive, args=(theirs, store.port, rank), daemon=True).start()
        pipes.append(ours)
    wires = _join(store, 0)
    tensor = torch.ones(BUCKET_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {road: [] for road in ROADS}
    for _ in range(num_runs + 1):
        for road in ROADS:
            seconds[road].append(_seconds(partial(wires[road].broadcast, tensor), pipes, road))
    for pipe in pipes:
        pipe.send(None)
    for wire in wires.values():
        wire.close()
    relay_s, group_s = (median(seconds[road][1:]) for road in ROADS)
    return Measured(BUCKET_BYTES, relay_s, group_s, num_runs)


def _join(store: TCPStore, rank: int) -> dict[str, Transport]:
    return {
        "relay": RelayGroup(store, "relay", rank, NUM_RANKS, HOST, TIMEOUT_S, FANOUT),
        "group": GlooGroup(store, "group", rank, NUM_RANKS, HOST, TIMEOUT_S),
    }


def _receive(pipe: Connection, port: int, rank: int) -> None:
    torch.set_num_threads(1)
    wires = _join(reach_store(HOST, port, rank, TIMEOUT_S), rank)
    tensor = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
    while (road := pipe.recv()) is not None:
        tensor.zero_()
        pipe.send(None)
        wires[road].broadcast(tensor)
        pipe.send(bool(tensor[0]) and bool(tensor[-1]))
    for wire in wires.values():
        wire.close()


def _seconds(send: Callable[[], None], pipes: Sequence[Connection], road: str) -> float:
    for pipe in pipes:
        pipe.send(road)
    for pipe in pipes:
        _answer(pipe)
    started = time.perf_counter()
    send()
    whole = [_answer(pipe) for pipe in pipes]
    seconds = time.perf_counter() - started
    assert all(whole), "what has arrived is what was sent"
    return seconds


def _answer(pipe: Connection) -> object:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError("a receiving process does not answer")
    return pipe.recv()
