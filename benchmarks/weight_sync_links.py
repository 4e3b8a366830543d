"""A relay against one group where links are the bottleneck: nine processes, each behind a slow link of its own.

    python -m benchmarks.weight_sync_links

Linux only: network namespaces, one for each process, joined by a bridge; what each sends is held to RATE_MBIT. They are
made inside a user namespace, so it needs no root and leaves nothing behind (it needs ip, tc and unshare). About two
minutes. Prints a table and, as its last line, one JSON object: for each road the time until every worker has all
buckets over the time that a link takes for one copy, as measured and as `sync/fanout.py` predicts.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import timedelta
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed import TCPStore

from benchmarks.usage import parser_of
from sync.fanout import Link, cut, group_tree, relay_tree, time_of
from sync.gloo import GlooGroup, reach_store
from sync.relay import RelayGroup
from sync.transport import Transport

NUM_RANKS, RATE_MBIT, NUM_RUNS = 9, 300, 2
NUM_BUCKETS, BUCKET_BYTES, SLICE_BYTES = 3, 32 * 2**20, 2 * 2**20
LATENCY_S = 0.5e-3
"""For the prediction: what a message costs between two processes of this machine."""
ROADS: dict[str, int | None] = {"chain": 1, "fan-out 2": 2, "fan-out 3": 3, "one group": None}
PORT, TIMEOUT_S = 29777, 60.0

_BRIDGE = """
mount -t tmpfs none /run && mkdir /run/netns
ip link set lo up && ip link add bridge type bridge && ip link set bridge up
"""
_NODE = """
ip netns add node{rank} && ip link add port{rank} type veth peer name link{rank}
ip link set link{rank} netns node{rank} && ip link set port{rank} master bridge up
ip netns exec node{rank} ip link set lo up
ip netns exec node{rank} ip addr add {host}/24 dev link{rank}
ip netns exec node{rank} ip link set link{rank} up
ip netns exec node{rank} tc qdisc add dev link{rank} root tbf rate {rate}mbit burst 256kb latency 100ms
"""


def host_of(rank: int) -> str:
    return f"10.9.0.{rank + 1}"


def build() -> None:
    """A network of slow links, and a process at the end of each; ends when they do."""
    script = _BRIDGE + "".join(_NODE.format(rank=r, host=host_of(r), rate=RATE_MBIT) for r in range(NUM_RANKS))
    subprocess.run(["bash", "-e", "-c", script], check=True)
    this = [sys.executable, "-m", "benchmarks.weight_sync_links"]
    ranks = [subprocess.Popen(["ip", "netns", "exec", f"node{r}", *this, str(r)]) for r in range(NUM_RANKS)]
    try:
        for rank in ranks:
            rank.wait(600.0)
    finally:
        for rank in ranks:
            rank.kill()


def meet(rank: int) -> TCPStore:
    if rank == 0:
        return TCPStore(host_of(0), PORT, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    time.sleep(2.0)
    return reach_store(host_of(0), PORT, rank, TIMEOUT_S)


def take_part(rank: int) -> None:
    """All roads in turns; rank 0 reports."""
    torch.set_num_threads(1)
    store, host = meet(rank), host_of(rank)
    wires: dict[str, Transport] = {
        road: GlooGroup(store, road, rank, NUM_RANKS, host, TIMEOUT_S)
        if fanout is None
        else RelayGroup(store, road, rank, NUM_RANKS, host, TIMEOUT_S, fanout, slice_bytes=SLICE_BYTES)
        for road, fanout in ROADS.items()
    }
    turns = GlooGroup(store, "turns", rank, NUM_RANKS, host, TIMEOUT_S)
    buckets = [torch.full((BUCKET_BYTES,), int(rank == 0), dtype=torch.uint8) for _ in range(NUM_BUCKETS)]
    seconds: dict[str, list[float]] = {road: [] for road in ROADS}
    for _ in range(NUM_RUNS):
        for road, wire in wires.items():
            turns.broadcast(torch.zeros(1))
            started = time.perf_counter()
            for bucket in buckets:
                wire.broadcast(bucket)
            for worker in range(1, NUM_RANKS):
                turns.broadcast(torch.zeros(1), worker)  # it has all
            seconds[road].append(time.perf_counter() - started)
            assert all(bool(bucket.all()) for bucket in buckets), "what has arrived is what was sent"
            if rank > 0:
                for bucket in buckets:
                    bucket.zero_()
    for wire in (*wires.values(), turns):
        wire.close()
    if rank == 0:
        report({road: median(each) for road, each in seconds.items()})


def predicted(fanout: int | None) -> float:
    """Seconds."""
    link, num_bytes = Link(LATENCY_S, RATE_MBIT * 1e6 / 8), NUM_BUCKETS * BUCKET_BYTES
    if fanout is None:
        return time_of(group_tree(NUM_RANKS), cut(num_bytes, BUCKET_BYTES, BUCKET_BYTES), link)
    return time_of(relay_tree(NUM_RANKS, fanout), cut(num_bytes, BUCKET_BYTES, SLICE_BYTES), link)


def report(seconds: dict[str, float]) -> None:
    copy_s = NUM_BUCKETS * BUCKET_BYTES / (RATE_MBIT * 1e6 / 8)
    shown = Table("road", "measured", "predicted", "seconds", title=f"over {copy_s:.2f} s, one copy over one link")
    figures = {}
    for road, measured_s in seconds.items():
        ratios = {"measured": measured_s / copy_s, "predicted": predicted(ROADS[road]) / copy_s}
        figures[road] = ratios
        shown.add_row(road, *(f"{ratio:.2f}" for ratio in ratios.values()), f"{measured_s:.2f}")
    Console().print(shown)
    print(json.dumps(figures))


def main() -> None:
    parser = parser_of("benchmarks.weight_sync_links", __doc__)
    parser.add_argument("part", nargs="?", help=argparse.SUPPRESS)  # of the processes that it starts itself
    match parser.parse_args().part:
        case None:
            this = [sys.executable, "-m", "benchmarks.weight_sync_links", "build"]
            sys.exit(subprocess.run(["unshare", "--map-root-user", "--net", "--mount", *this]).returncode)
        case "build":
            build()
        case rank:
            take_part(int(rank))


if __name__ == "__main__":
    main()
