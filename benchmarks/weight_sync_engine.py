"""A real vLLM replica that samples all the time while whole versions are published to it from another process.

The engine is driven as a RolloutActor drives it, without Ray. One core is the engine's; the other core carries what a
cluster has on other nodes too: the sender, both ends of the wire and this process.
"""

import asyncio
import contextlib
import gc
import itertools
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from actors.rollout import received
from sync.config import SyncConfig
from sync.layout import Layout, Parameter, plan_layout
from sync.member import Membership
from sync.sender import Gather, Sender, Sent
from sync.staging import CPU
from sync.transport import open_wire

HOST = "127.0.0.1"
TIMEOUT_S = 120.0
BUCKET_BYTES = 64 * 2**20
NUM_SEQUENCES = 8
NUM_TOKENS = 128
PUBLISH_EVERY_S = 2.0
VLLM_PAUSE_S = 0.020
"""AsyncLLM.pause_generation holds this long, whatever it has to do (vllm/v1/engine/async_llm.py)."""


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """Of one replica; medians over the publications and windows of one run."""

    num_bytes: int
    pause_s: float
    """From the call that pauses to the return of the one that resumes."""
    swap_s: float
    total_s: float
    """From the announcement to the resumption."""
    copy_s: float
    """One copy of the model's bytes in memory."""
    step_s: float
    """One step of the engine, all sequences decoding, without publications."""
    tokens_per_s: float
    tokens_per_s_published: float
    throughput_kept: float
    """Of neighbouring windows, with and without publications."""
    num_publications: int
    num_windows: int

    @property
    def bound_s(self) -> float:
        return self.copy_s + self.step_s + VLLM_PAUSE_S


def measure(num_publications: int = 8, num_windows: int = 5, window_s: float = 6.0) -> EngineFigures:
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(_measure(Path(folder), num_publications, num_windows, window_s))
    gc.collect()  # an engine that is left to the interpreter's end complains there
    return figures


async def _measure(folder: Path, num_publications: int, num_windows: int, window_s: float) -> EngineFigures:
    async with _replica(folder) as replica:
        for version in (0, 1, 2):  # by vLLM's reload, then with memory touched for the first time
            await replica.publish(version)
        await asyncio.sleep(2.0)
        versions = itertools.count(3)
        steps: list[float] = []
        rows: list[tuple[float, float, float]] = []
        plain: list[float] = []
        published: list[float] = []
        for _ in range(num_publications):
            steps.append(NUM_SEQUENCES / await replica.rate(1.0))
            rows.append(await replica.publish(next(versions)))
        for _ in range(num_windows):
            plain.append(await replica.rate(window_s))
            publishing = asyncio.create_task(_keep_publishing(replica, versions))
            published.append(await replica.rate(window_s))
            publishing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await publishing
        pause_s, swap_s, total_s = (median(row[index] for row in rows) for index in range(3))
        return EngineFigures(
            num_bytes=replica.num_bytes,
            pause_s=pause_s,
            swap_s=swap_s,
            total_s=total_s,
            copy_s=_copy_s(replica.num_bytes),
            step_s=median(steps),
            tokens_per_s=median(plain),
            tokens_per_s_published=median(published),
            throughput_kept=median(busy / quiet for busy, quiet in zip(published, plain, strict=True)),
            num_publications=num_publications,
            num_windows=num_windows,
        )


async def _keep_publishing(replica: "Replica", versions: "itertools.count[int]") -> None:
    while True:
        started = time.perf_counter()
        await asyncio.shield(replica.publish(next(versions)))
        await asyncio.sleep(max(0.0, PUBLISH_EVERY_S - (time.perf_counter() - started)))


class Replica:
    """The engine, NUM_SEQUENCES requests that follow each other without end, and the sender's process."""

    def __init__(self, engine: Any, sender: Connection, num_bytes: int) -> None:
        self.engine = engine
        self.num_bytes = num_bytes
        self._sender = sender
        self._num_tokens = 0
        self._lock = asyncio.Lock()

    async def sample(self, index: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for turn in itertools.count():
            sampling = SamplingParams(
                max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
            )
            request: Any = {"prompt_token_ids": [5 + index] * 16}
            async for output in self.engine.generate(request, sampling, f"{index}-{turn}"):
                self._num_tokens += len(output.outputs[0].token_ids)

    async def rate(self, seconds: float) -> float:
        """Tokens a second over a window."""
        started, before = time.perf_counter(), self._num_tokens
        await asyncio.sleep(seconds)
        return (self._num_tokens - before) / (time.perf_counter() - started)

    async def publish(self, version: int) -> tuple[float, float, float]:
        """Seconds of the pause, of the swap inside it, and of the whole."""
        async with self._lock:
            engine = self.engine
            started = time.perf_counter()
            await engine.collective_rpc("begin_receive", args=(version,))
            sent: Sent = (await asyncio.gather(self._ask(("send", version)), received(engine)))[0]
            await engine.collective_rpc("verify", args=(version, list(sent.digests)))
            pausing = time.perf_counter()
            await engine.pause_generation(mode="keep", clear_cache=False)
            paused = time.perf_counter()
            await engine.collective_rpc("swap")
            swapped = time.perf_counter()
            await engine.resume_generation()
            done = time.perf_counter()
            return done - pausing, swapped - paused, done - started

    async def _ask(self, question: tuple[Any, ...]) -> Any:
        self._sender.send(question)
        if not await asyncio.to_thread(self._sender.poll, TIMEOUT_S):
            raise TimeoutError("the sending process does not answer")
        return self._sender.recv()


@contextlib.asynccontextmanager
async def _replica(folder: Path) -> AsyncIterator[Replica]:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    layout = _write_model(folder)
    pipe, theirs = mp.get_context("spawn").Pipe()
    sending = mp.get_context("spawn").Process(target=_send, args=(theirs, layout.to_json()))
    sending.start()
    engine = await asyncio.to_thread(_engine, folder)
    try:
        membership: Membership = await asyncio.to_thread(pipe.recv)
        await engine.collective_rpc("join_group", args=(membership.at(1).model_dump_json(), HOST))
        replica = Replica(engine, pipe, layout.num_bytes)
        sampling = [asyncio.create_task(replica.sample(index)) for index in range(NUM_SEQUENCES)]
        await asyncio.sleep(5.0)
        yield replica
        for task in sampling:
            task.cancel()
        await asyncio.gather(*sampling, return_exceptions=True)
    finally:
        engine.shutdown()
        pipe.send(("stop",))
        sending.join(TIMEOUT_S)


def _engine(folder: Path) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=NUM_SEQUENCES,
            worker_extension_cls="sync.receiver.WeightReceiver",
            disable_log_stats=True,
        )
    )


def model_config() -> Any:
    """A Qwen3 of 218 MB in bf16, tied."""
    from transformers import Qwen3Config

    untyped: Any = Qwen3Config
    return untyped(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )


def _write_model(folder: Path) -> Layout:
    """The model's config; the weights come over the wire."""
    from transformers import Qwen3ForCausalLM

    config = model_config()
    config.save_pretrained(folder)
    untyped: Any = Qwen3ForCausalLM
    with torch.device("meta"):
        shapes = [(name, tuple(value.shape)) for name, value in untyped(config).named_parameters()]
    return plan_layout([Parameter(name, "bfloat16", shape) for name, shape in shapes], BUCKET_BYTES)


def _send(pipe: Connection, layout_json: str) -> None:
    """The policy's rank 0: two versions take turns."""
    torch.set_num_threads(1)
    layout = Layout.from_json(layout_json)
    parameters = [placed.parameter for bucket in layout.buckets for placed in bucket.tensors]
    versions = [{p.name: torch.randn(p.shape, dtype=torch.bfloat16).mul_(0.02) for p in parameters} for _ in range(2)]
    opened = open_wire("gloo", HOST, TIMEOUT_S)
    config = SyncConfig(timeout_s=TIMEOUT_S)
    membership = Membership(ticket=opened.ticket, rank=0, world_size=2, layout_json=layout_json, config=config)
    pipe.send(membership)
    sender = Sender(layout, membership.join(HOST, CPU, opened))
    while True:
        match pipe.recv():
            case ("send", version):
                pipe.send(sender.send(version, _gather_from(versions[version % 2])))
            case _:
                break


def _gather_from(tensors: dict[str, torch.Tensor]) -> Gather:
    return lambda names: contextlib.nullcontext({name: tensors[name] for name in names})


def _copy_s(num_bytes: int) -> float:
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
