"""A tiny model is found whole or not at all, and the same config and seed give the same bytes."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from actors.recipe.model import TinyModel

PAD, EOS, TURN_START, TURN_END = "<pad>", "<eos>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, EOS, TURN_START, TURN_END)

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention supports on CPUs (vllm/v1/attention/backends/cpu_attn.py)."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tiny_model(config: TinyModel, out_dir: Path, seed: int) -> None:
    """Leaves `out_dir` as a complete Hugging Face model folder, or leaves no `out_dir` at all.

    The folder loads with AutoTokenizer and AutoModelForCausalLM and into vLLM. Weights are random, float32.
    ValueError when the sizes do not fit together, or when `out_dir` holds something already.
    """
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir}: exists and is not empty; remove it, or choose another folder for the tiny model")
    tokenizer = byte_tokenizer(config.max_position_embeddings)
    model = _random_model(_model_config(config, tokenizer), seed)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = out_dir.parent / f".{out_dir.name}.staging-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        os.rename(staging, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def tiny_skeleton(config: TinyModel) -> Qwen3ForCausalLM:
    """The model without its weights, on the meta device; ValueError when the sizes do not fit together."""
    untyped_model: Any = Qwen3ForCausalLM
    with torch.device("meta"):
        model: Qwen3ForCausalLM = untyped_model(_model_config(config, byte_tokenizer(config.max_position_embeddings)))
    return model


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8 (id = the byte), then the special tokens; no BOS; decode(encode(text)) == text."""
    # BPE without merges leaves single bytes, each written as the one character that byte-level BPE has for it.
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    untyped: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = untyped(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    return fast


def _byte_characters() -> list[str]:
    """The character that stands for each byte 0..255: printable ones for themselves, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    characters = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    assert set(characters) == set(pre_tokenizers.ByteLevel.alphabet())
    return characters


def _model_config(config: TinyModel, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The Qwen3 config of a tiny model; ValueError names the key when the sizes do not fit."""
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"model.num_heads: {config.num_heads} heads do not divide model.hidden_size {config.hidden_size}; "
            "choose sizes that divide"
        )
    head_dim = config.hidden_size // config.num_heads
    if head_dim not in HEAD_SIZES:
        raise ValueError(
            f"model.hidden_size: {config.hidden_size} over {config.num_heads} heads makes heads of {head_dim}, which "
            f"vLLM's CPU attention does not support; choose hidden_size = num_heads x one of "
            f"{', '.join(map(str, HEAD_SIZES))}"
        )
    return Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _random_model(config: Qwen3Config, seed: int) -> Qwen3ForCausalLM:
    """Float32 weights that depend on the config and the seed alone; the process's own random state is untouched."""
    untyped_model: Any = Qwen3ForCausalLM
    untyped_generation: Any = GenerationConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Qwen3ForCausalLM = untyped_model(config).float()
    # A turn of a conversation ends with its own token, so generation stops at either.
    turn_end = 256 + SPECIAL_TOKENS.index(TURN_END)
    model.generation_config = untyped_generation(
        eos_token_id=[config.eos_token_id, turn_end], pad_token_id=config.pad_token_id, do_sample=True
    )
    return model
