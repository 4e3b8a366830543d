"""The wire between two processes of this machine: our publication, a bare broadcast, and one broadcast per tensor.

The parent sends, a child receives. What is compared is measured in turns, so that both see the same machine.
"""

import contextlib
import multiprocessing as mp
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sync.gloo import GlooGroup, open_store
from sync.layout import Layout, Parameter, plan_layout
from sync.sender import Sender, Sent
from sync.staging import Staging

HOST = "127.0.0.1"
TIMEOUT_S = 120.0
BUCKET_BYTES = 64 * 2**20

NUM_LARGE, LARGE = 16, (4096, 4096)
"""512 MiB in bf16."""
NUM_DELTA_MATRICES = 2
LEARNING_RATE = 1e-6


@dataclass(frozen=True, slots=True)
class Comparison:
    """Medians in seconds of the same bytes by two roads."""

    num_bytes: int
    num_tensors: int
    ours_s: float
    theirs_s: float
    num_runs: int


@dataclass(frozen=True, slots=True)
class DeltaCost:
    """Versions that differ by a step of AdamW, sent as changes."""

    num_elements: int
    num_changed: int
    num_bytes: int
    full_bytes: int
    overhead: float
    """The worst version's bytes over six for each changed element."""
    exact: bool
    seconds: float
    full_s: float


def large_parameters() -> list[Parameter]:
    return [Parameter(f"layers.{index}.weight", "bfloat16", LARGE) for index in range(NUM_LARGE)]


def small_parameters() -> list[Parameter]:
    """Names as in Qwen3-0.6B (28 layers, 310 tensors), sizes of a test model."""
    hidden, inner, vocab = 64, 192, 512
    matrices = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden)}
    matrices |= {"self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden)}
    matrices |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = {"self_attn.q_norm": (32,), "self_attn.k_norm": (32,)}
    norms |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(28):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in (matrices | norms).items()}
    return [Parameter(name, "bfloat16", shape) for name, shape in shapes.items()]


class Wire:
    """Two groups between the same two processes: ours and torch.distributed's own."""

    def __init__(self, parameters: list[Parameter], delta: bool = False) -> None:
        self.parameters = parameters
        self.layout = plan_layout(parameters, BUCKET_BYTES)
        self.tensors = {p.name: torch.randn(p.shape, dtype=torch.bfloat16).mul_(0.02) for p in parameters}
        store, port = open_store(HOST, TIMEOUT_S), _free_port()
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, store.port, port, self.layout.to_json(), delta)
        self._child = context.Process(target=_receive, args=arguments)
        self._child.start()
        group = GlooGroup(store, "bench", 0, 2, HOST, TIMEOUT_S)
        dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=0, world_size=2)
        self._sender = Sender(self.layout, group, delta=delta)
        self._version = -1
        self._flat = torch.zeros(0)

    def publish(self, full: bool = False) -> Sent:
        """Announced, streamed, verified."""
        self._version += 1
        self._ask("publish", self._version)
        sent = self._sender.send(self._version, self._gather, full)
        self._ask("verify", self._version, list(sent.digests))
        return sent

    def flat(self) -> None:
        """The same bytes as one tensor, in one broadcast."""
        if not self._flat.numel():
            self._flat = torch.ones(self.layout.num_bytes, dtype=torch.uint8)
        self._pipe.send(("flat",))
        dist.broadcast(self._flat, 0)
        self._answer()

    def per_tensor(self) -> None:
        self._pipe.send(("per_tensor",))
        for tensor in self.tensors.values():
            dist.broadcast(tensor, 0)
        self._answer()

    def same(self) -> bool:
        """The child holds our bytes."""
        self._pipe.send(("tensors",))
        received: dict[str, Tensor] = self._answer()
        ours = self.tensors.items()
        return all(torch.equal(received[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in ours)

    def close(self) -> None:
        self._pipe.send(("stop",))
        self._child.join(TIMEOUT_S)
        dist.destroy_process_group()

    def _gather(self, names: tuple[str, ...]) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        return contextlib.nullcontext({name: self.tensors[name] for name in names})

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError("the receiving process does not answer")
        return self._pipe.recv()


def _receive(pipe: Connection, store_port: int, port: int, layout_json: str, delta: bool) -> None:
    layout = Layout.from_json(layout_json)
    group = GlooGroup.join(HOST, store_port, "bench", 1, 2, HOST, TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{port}", rank=1, world_size=2)
    staging = Staging(layout, group, delta=delta)
    flat = torch.zeros(0)
    each = [torch.zeros(p.parameter.shape, dtype=torch.bfloat16) for b in layout.buckets for p in b.tensors]
    while True:
        match pipe.recv():
            case ("publish", version):
                staging.begin(version)
                pipe.send(None)
            case ("verify", version, digests):
                staging.verify(version, digests, TIMEOUT_S)
                staging.commit()
                pipe.send(None)
            case ("flat",):
                if not flat.numel():
                    flat = torch.zeros(layout.num_bytes, dtype=torch.uint8)
                dist.broadcast(flat, 0)
                pipe.send(None)
            case ("per_tensor",):
                for tensor in each:
                    dist.broadcast(tensor, 0)
                pipe.send(None)
            case ("tensors",):
                pipe.send({name: tensor.clone() for name, tensor in staging.tensors()})
            case _:
                break
    dist.destroy_process_group()


def compare(parameters: list[Parameter], road: Callable[[Wire], None], num_runs: int) -> Comparison:
    """Ours and `road`, in turns; the first of each, which touches the memory, is not counted."""
    with open_wire(parameters) as wire:
        seconds = [(_seconds(wire.publish), _seconds(lambda: road(wire))) for _ in range(num_runs + 1)][1:]
        assert wire.same()
        ours, theirs = zip(*seconds, strict=True)
        return Comparison(wire.layout.num_bytes, len(parameters), median(ours), median(theirs), num_runs)


def delta_cost(num_steps: int = 3) -> DeltaCost:
    """Float32 masters trained by AdamW on random gradients, published in bf16."""
    with open_wire(large_parameters()[:NUM_DELTA_MATRICES], delta=True) as wire:
        full_s = [_seconds(wire.publish), _seconds(lambda: wire.publish(full=True))][1]
        masters = [tensor.float().requires_grad_() for tensor in wire.tensors.values()]
        optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.0)
        rows, exact = [], True
        for _ in range(num_steps):
            for master in masters:
                master.grad = torch.randn_like(master)
            optimizer.step()
            wire.tensors = {name: m.detach().bfloat16() for name, m in zip(wire.tensors, masters, strict=True)}
            started = time.perf_counter()
            sent = wire.publish()
            rows.append((sent.num_bytes, sent.num_changed or 0, time.perf_counter() - started))
            exact = exact and wire.same()
        num_bytes, num_changed, seconds = max(rows, key=lambda row: row[0] / max(1, row[1]))
        num_elements = sum(master.numel() for master in masters)
        overhead = num_bytes / (6 * num_changed)
        return DeltaCost(num_elements, num_changed, num_bytes, wire.layout.num_bytes, overhead, exact, seconds, full_s)


@contextlib.contextmanager
def open_wire(parameters: list[Parameter], delta: bool = False) -> Iterator[Wire]:
    """Closed with the context."""
    torch.manual_seed(0)
    wire = Wire(parameters, delta)
    try:
        yield wire
    finally:
        wire.close()


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
