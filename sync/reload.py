"""The model is loaded as from a checkpoint, by vLLM's layerwise reload; it must not compute meanwhile.

A layer's tensors are held until all of them are here, then loaded, packed or quantized as vLLM does at its start, and
copied to where the layer's weights have always been.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Reload:
    """Follows a version that is not staged: `begin`, `arrived` for every bucket, and `swap` once all is verified."""

    def __init__(self, model: Any, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        self._loaded: set[str] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Every parameter is awaited; a reload that was left half-way is closed first."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._loaded is not None:
            self._finalize()
        self._device = next(self._model.parameters()).device
        self._expected = {name for name, _ in self._model.named_parameters()}
        self._loaded = set()
        initialize_layerwise_reload(self._model)

    @torch.no_grad()
    def arrived(self, tensors: dict[str, Tensor]) -> None:
        assert self._loaded is not None, "begin comes first"
        self._loaded |= self._model.load_weights((name, tensor.to(self._device)) for name, tensor in tensors.items())

    @torch.no_grad()
    def swap(self, tensors: Iterable[tuple[str, Tensor]] = ()) -> None:
        """The model computes with what has arrived; RuntimeError when a parameter has not."""
        assert self._loaded is not None, "begin comes first"
        missing = sorted(self._expected - self._loaded)
        self._finalize()
        if missing:  # vLLM would go on with the old values and only log it
            raise RuntimeError(f"{len(missing)} parameters were not among the weights sent: {', '.join(missing[:5])}")
        _repack_tied_head(self._model)

    def _finalize(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self._model, self._model_config)
        self._loaded = None


def _repack_tied_head(model: Any) -> None:
    """Make a tied output head follow its embedding.

    On the CPU vLLM keeps a packed copy of every linear layer, the output head's included. A tied head loads no weights
    of its own, so the reload leaves its packed copy at the old version (vLLM 0.32 warns only "ParallelLMHead: Failed
    to load weights"). On GPUs nothing is packed and this is a no-op.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and model.config.tie_word_embeddings:
        head.quant_method.process_weights_after_loading(head)
