"""The model that a rank trains: as its objective needs it, and with adapters on top where only these learn."""

import functools
from collections.abc import Callable

from transformers import PreTrainedModel

from actors.model.files import make_savable
from actors.model.forward import PACKED_ATTENTION
from actors.model.head import put_scoring_head
from actors.model.heads import check_heads
from actors.model.kernels import put_kernels
from actors.model.load import disable_dropout, load_causal_lm, load_scorer
from actors.model.lora import adapt, base_digest
from actors.model.quantize import keep_layout, quantization
from actors.policy_calls import PolicySettings


def load_learner(settings: PolicySettings) -> tuple[PreTrainedModel, str | None]:
    """The model, and the digest of the frozen weights below an adapter; ValueError when it cannot learn so."""
    model = _load(settings)
    who = "critic" if settings.objective.numbers == "values" else "policy"
    check_heads(model, settings.policy.sequence_parallel_size, f"{who}.sequence_parallel_size")
    put_kernels(model, settings.policy.liger, settings.use_gpu)
    make_savable(model)
    if settings.objective.numbers is not None:
        disable_dropout(model)  # a sequence must amount to the same whenever it is asked
    if not settings.objective.has_scalar_head and not put_scoring_head(model) and settings.teacher is not None:
        raise ValueError(
            f"model.path: the logits of '{settings.model_path}' are capped or changed behind its head, so they "
            "cannot be compared with a teacher's slab by slab; leave distillation out"
        )
    if settings.policy.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.policy.lora is None:
        return model, None
    base = base_digest(model)
    adapt(model, settings.policy.lora)
    if settings.policy.gradient_checkpointing:
        model.enable_input_require_grads()  # a checkpoint whose inputs need no gradient may give none
    return model, base


def _load(settings: PolicySettings) -> PreTrainedModel:
    """With one number at a token, or with logits."""
    load: Callable[..., PreTrainedModel] = load_scorer
    if not settings.objective.has_scalar_head:
        four_bits = quantization(settings.policy.lora, settings.policy.dtype)
        load = functools.partial(load_causal_lm, quantization=four_bits)
    model = load(
        settings.model_path,
        settings.revision,
        settings.trust_remote_code,
        dtype=settings.policy.dtype,
        attn_implementation=PACKED_ATTENTION,
    )
    keep_layout(model)
    return model
