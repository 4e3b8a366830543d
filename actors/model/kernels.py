"""Fused kernels of liger-kernel in place of a model's own norms, rotary embedding and gated MLP, on GPUs.

Its kernels of the output head and the loss are left out: the scoring head makes no logits as a whole either, and knows
every loss here. Not run on a GPU yet; in triton's interpreter, on a CPU, they give the values and gradients of plain
layers.
"""

from importlib.util import find_spec
from typing import Any, Literal

from transformers import PreTrainedModel

Wish = bool | Literal["auto"]
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers were compared with liger's; of others it may know more than was looked at."""


def check_kernels(wish: Wish, use_gpu: bool) -> None:
    """ValueError when they are wanted, and cannot be imported here."""
    if wish is True and use_gpu and not _are_installed():
        raise ValueError(
            "policy.liger: true needs the package liger-kernel, which is not installed here; install "
            "deploy/requirements/gpu_extra.txt where the policy runs, or set policy.liger to auto"
        )


def put_kernels(model: PreTrainedModel, wish: Wish, use_gpu: bool) -> bool:
    """Whether the model computes with them now; it must still be whole, and without adapters.

    With 'auto' a model gets them where they are installed and known; ValueError when they are wanted and cannot be had.
    """
    check_kernels(wish, use_gpu)
    model_type = model.config.model_type
    if wish is True and use_gpu and model_type not in KNOWN:
        raise ValueError(
            f"policy.liger: true, but models of type '{model_type}' were not tried with liger-kernel, those of type "
            f"{', '.join(KNOWN)} were; set policy.liger to auto"
        )
    if wish is False or not use_gpu or model_type not in KNOWN or not _are_installed():
        return False
    import liger_kernel.transformers

    apply: Any = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{model_type}")
    apply(model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def _are_installed() -> bool:
    return find_spec("liger_kernel") is not None
