"""A replica swaps to a version only after it holds every byte of it, verified; until then the old version serves.

The receiver lives in each vLLM worker process (`worker_extension_cls`) and is driven by `collective_rpc`:

    join_group(...)      once: the broadcast group and the layout
    begin_receive(v)     a thread fills the staging buffers while generation goes on
    verify(v, digests)   all buckets are here and their digests match the sender's
    swap(v)              generation is paused: staging -> model; microseconds per tensor, no network
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from sync.gloo import GlooGroup
from sync.layout import Layout, digest, unpack


class Staging:
    """One version's bytes as they arrive; usable without vLLM, so that the wire can be tested on its own."""

    def __init__(self, layout: Layout, group: GlooGroup) -> None:
        self._layout = layout
        self._group = group
        self._buffers = [torch.zeros(bucket.num_bytes, dtype=torch.uint8) for bucket in layout.buckets]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights-receive")
        self._receiving: tuple[int, Future[list[str]]] | None = None

    def begin(self, version: int) -> None:
        """Start to receive `version` on a thread; returns at once."""
        assert self._receiving is None, f"version {self._receiving and self._receiving[0]} was never verified"
        self._receiving = version, self._thread.submit(self._receive)

    def verify(self, version: int, digests: list[str], timeout_s: float) -> None:
        """All buckets have arrived as they were sent; raises RuntimeError naming the first that did not."""
        assert self._receiving is not None, "nothing is being received"
        expected, future = self._receiving
        self._receiving = None
        if expected != version:
            raise RuntimeError(f"version {version} is to be verified, but version {expected} was announced")
        received = future.result(timeout_s)
        for index, (ours, theirs) in enumerate(zip(received, digests, strict=True)):
            if ours != theirs:
                raise RuntimeError(f"version {version}: bucket {index} of {len(digests)} arrived damaged")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The verified version, tensor by tensor, as views of the staging buffers."""
        for bucket, buffer in zip(self._layout.buckets, self._buffers, strict=True):
            yield from unpack(bucket, buffer)

    def _receive(self) -> list[str]:
        digests = []
        for bucket, buffer in zip(self._layout.buckets, self._buffers, strict=True):
            self._group.broadcast(buffer)
            digests.append(digest(bucket, buffer))
        return digests


class WeightReceiver:
    """vLLM mixes this class into its worker; `model_runner` and `rank` are the worker's own."""

    model_runner: Any
    rank: int

    def join_group(
        self, store_host: str, store_port: int, group: str, first_rank: int, world_size: int, host: str,
        layout: str, timeout_s: float,
    ) -> None:  # fmt: skip
        """Join the broadcast group as rank `first_rank` + this worker's tensor-parallel rank."""
        rank = first_rank + self.rank
        joined = GlooGroup.join(store_host, store_port, group, rank, world_size, host, timeout_s)
        self.staging = Staging(Layout.from_json(layout), joined)
        self.timeout_s = timeout_s

    def begin_receive(self, version: int) -> None:
        self.staging.begin(version)

    def verify(self, version: int, digests: list[str]) -> None:
        self.staging.verify(version, digests, self.timeout_s)

    def swap(self) -> None:
        """Load the verified tensors into the running model; generation must be paused."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        device = next(model.parameters()).device
        expected = {name for name, _ in model.named_parameters()}
        initialize_layerwise_reload(model)
        loaded = model.load_weights((name, tensor.to(device)) for name, tensor in self.staging.tensors())
        finalize_layerwise_reload(model, self.model_runner.model_config)
        if missing := sorted(expected - loaded):
            # vLLM would go on with the old values and only log it.
            raise RuntimeError(f"{len(missing)} parameters were not among the weights sent: {', '.join(missing[:5])}")
        _repack_tied_head(model)


def _repack_tied_head(model: Any) -> None:
    """Make a tied output head follow its embedding.

    On the CPU vLLM keeps a packed copy of every linear layer, the output head's included. A tied head loads no weights
    of its own, so the reload leaves its packed copy at the old version (vLLM 0.32 warns only "ParallelLMHead: Failed
    to load weights"). On GPUs nothing is packed and this is a no-op.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and model.config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)
