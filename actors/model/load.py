"""A model that cannot be loaded is one ValueError that names the path and the fix."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Dtype = Literal["float32", "bfloat16"]


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name or local folder; it has an end-of-sequence token and a padding token.

    ValueError when the path is neither a folder nor reachable on the hub, or when there is no EOS token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_why(path, revision, trust_remote_code, "tokenizer", error)) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.path: the tokenizer of '{path}' has no end-of-sequence token, so no rollout could end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    dtype: Dtype,
    attn_implementation: str = "sdpa",
    quantization: Any | None = None,
) -> PreTrainedModel:
    """The causal language model with its weights in `dtype`, on the CPU; ValueError as in `load_tokenizer`.

    `quantization`: how its linear layers are held instead (actors/model/quantize.py), on the GPU where there is one.
    """
    from_pretrained: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    if quantization is not None:
        from_pretrained = partial(from_pretrained, quantization_config=quantization)
    return _load(from_pretrained, path, revision, trust_remote_code, dtype, attn_implementation)


def load_scorer(
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    dtype: Dtype,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The model with a head that gives a sequence one score, for `row_scores`; ValueError as in `load_tokenizer`.

    The head is new, drawn from torch's random state, unless the model is a reward model already.
    """
    from actors.model.forward import score_places

    with_one_score = partial(AutoModelForSequenceClassification.from_pretrained, num_labels=1)
    model: Any = _load(with_one_score, path, revision, trust_remote_code, dtype, attn_implementation)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ValueError(
            f"model.path: transformers gives '{path}' another head than one linear layer 'score'; choose a decoder "
            "model such as Llama, Mistral or Qwen"
        )
    # Others find the end of a padded sequence by it.
    model.config.pad_token_id = load_tokenizer(path, revision, trust_remote_code).pad_token_id
    model.forward = MethodType(score_places, model)
    scorer: PreTrainedModel = model
    return scorer


def _load(
    from_pretrained: Callable[..., Any],
    path: str,
    revision: str | None,
    trust_remote_code: bool,
    dtype: Dtype,
    attn_implementation: str,
) -> PreTrainedModel:
    try:
        model: PreTrainedModel = from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
        )
    except (OSError, ValueError) as error:
        raise ValueError(_why(path, revision, trust_remote_code, "model", error)) from error
    others = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(
            f"model.path: '{path}' has layers of type {', '.join(sorted(others))}, through which packed "
            "sequences would see each other; choose a model of attention layers only"
        )
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Training gives what evaluation gives, whatever dropout the model's config asks for."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # what transformers hands to its kernels
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - torch types every attribute as a tensor


def load_skeleton(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model without its weights, on the meta device: for what can be known from its config alone."""
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_why(path, revision, trust_remote_code, "model", error)) from error
    return model


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None) -> list[int]:
    """The tokens that end a completion: the tokenizer's EOS, and those that the model's generation config adds.

    Chat models often end their turn with another token than the one that ends a text.
    """
    ids = {int(tokenizer.eos_token_id)}
    try:
        listed = GenerationConfig.from_pretrained(path, revision=revision or "main").eos_token_id
    except OSError:
        listed = None  # a model without a generation config
    return sorted(ids | set([listed] if isinstance(listed, int) else listed or []))


def max_model_length(path: str, revision: str | None, trust_remote_code: bool) -> int:
    """The longest sequence (tokens) the model has positions for; ValueError when its config does not say."""
    try:
        config: Any = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_why(path, revision, trust_remote_code, "config", error)) from error
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ValueError(
            f"model.path: the config of '{path}' does not say max_position_embeddings, so the longest sequence is "
            "unknown; add it to the model's config.json"
        )
    return int(length)


def _why(path: str, revision: str | None, trust_remote_code: bool, part: str, error: Exception) -> str:
    """One line: what could not be loaded, why, and what to do."""
    reason = str(error).strip().split("\n")[0]
    folder = Path(path)
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return (
            f"model.path: '{path}' ships its own Python code; if you trust its author, set model.trust_remote_code "
            f"to true ({reason})"
        )
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        return (
            f"model.path: the folder '{path}' holds no {part} that can be loaded ({reason}); it must be in Hugging "
            f"Face layout (config.json, *.safetensors, tokenizer.json), it has {', '.join(names[:8]) or 'no files'}"
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return f"model.path: there is no folder '{path}' (working directory: {Path.cwd()}); correct model.path"
    at_revision = f" at revision '{revision}'" if revision else ""
    return (
        f"model.path: '{path}' is neither a folder here nor a model that the hub gives{at_revision} ({reason}); check "
        "the name, the network and HF_HUB_OFFLINE, or log in with HF_TOKEN when the model is gated"
    )
