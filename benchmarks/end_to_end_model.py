"""A tiny model whose completions end by themselves, most of them soon and a few very late.

A random model ends a completion with about the same small probability at every token. Here the weights themselves make
that probability fall with the length, so whoever samples from the model, by whatever engine, gets lengths with a long
tail. Three dimensions of the hidden state are set apart: one is the same for every token; one is set at the first
token alone, which every prompt begins with and no completion contains; and one head of the first layer, whose queries
are zero and which therefore looks at all tokens alike, carries it to the third, where it is 1 / (tokens so far). The
rows of the output head that end a completion read the first and the third.

Legend: T = tokens of a sequence, H = hidden size.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.model.tiny import make_tiny_model
from actors.recipe.model import TinyModel

CONFIG = TinyModel(kind="tiny", hidden_size=192, num_layers=4, num_heads=2, max_position_embeddings=640)
"""2.48 M parameters."""
FIRST = "#"
"""The token that every prompt begins with."""
NUM_PROMPT_TOKENS = 24
LAST_HAZARD = 1 / 110
"""Probability of the end at a token, far into a completion."""
MEAN_LENGTH, MAX_LENGTH = 46.0, 512

_EVERY, _FIRST, _SHARE = 0, 1, 2
"""The dimensions set apart: in every token, in the first one, the first one's share of the tokens so far."""
_SCALE = 0.1
_NEVER = -12.0


def make_stopping(folder: Path, seed: int) -> None:
    """Completions of prompts of NUM_PROMPT_TOKENS have a mean length of MEAN_LENGTH when MAX_LENGTH cuts them off."""
    shutil.rmtree(folder, ignore_errors=True)
    make_tiny_model(CONFIG, folder, seed)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    first = tokenizer(FIRST)["input_ids"][0]
    ends, *others = model.generation_config.eos_token_id
    with torch.no_grad():
        _set_apart(model, first)
        states_TH, rest_T = _final_states(model, first, ends)
        target_T = torch.logit(hazards(len(rest_T))) + rest_T
        head = model.lm_head.weight
        head[ends] = 0.0
        features = states_TH[:, [_EVERY, _SHARE]]
        head[ends, [_EVERY, _SHARE]] = torch.linalg.lstsq(features, target_T[:, None]).solution[:, 0]
        for token in (first, tokenizer.pad_token_id, *others):
            head[token] = 0.0
            head[token, _EVERY] = _NEVER / states_TH[:, _EVERY].mean()
    model.save_pretrained(folder)


def hazards(num_tokens: int) -> Tensor:
    """Probability that a completion ends at its token t, if it has not before: logistic in 1 / (tokens so far)."""
    length_T = NUM_PROMPT_TOKENS + torch.arange(num_tokens, dtype=torch.float64)
    low, high = 0.0, 400.0
    far = torch.logit(torch.tensor(LAST_HAZARD, dtype=torch.float64))
    for _ in range(60):  # the mean falls as the slope grows
        slope = (low + high) / 2
        hazard_T = torch.sigmoid(far + slope / length_T)
        low, high = (slope, high) if mean_length(hazard_T[:MAX_LENGTH]) > MEAN_LENGTH else (low, slope)
    return hazard_T.float()


def mean_length(hazard_T: Tensor) -> float:
    """Of completions that are cut off after T tokens."""
    alive_T = torch.cumprod(1 - hazard_T, 0)
    return float(1 + alive_T[:-1].sum())


def _set_apart(model: Any, first: int) -> None:
    """Three dimensions that nothing else writes to, and the head of the first layer that fills the last of them."""
    head_size = model.config.head_dim
    embedding = model.model.embed_tokens.weight
    for layer in model.model.layers:
        for writes in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            writes[[_EVERY, _FIRST, _SHARE]] = 0.0
    embedding[:, [_FIRST, _SHARE]] = 0.0
    embedding[:, _EVERY] = embedding[first, _FIRST] = _SCALE
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight[:head_size] = 0.0
    attention.v_proj.weight[:head_size] = 0.0
    attention.v_proj.weight[0, _FIRST] = 1.0
    attention.o_proj.weight[:, :head_size] = 0.0
    attention.o_proj.weight[_SHARE, 0] = 1.0


def _final_states(model: Any, first: int, ends: int) -> tuple[Tensor, Tensor]:
    """Of random text, from the last token of the prompt on: what the head reads, and all other tokens' logsumexp."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(97, 123, (16, NUM_PROMPT_TOKENS + MAX_LENGTH - 1), generator=generator)
    text[:, 0] = first
    output = model(text, output_hidden_states=True)
    logits = output.logits.index_fill(-1, torch.tensor([ends]), -torch.inf)
    after = NUM_PROMPT_TOKENS - 1
    return output.hidden_states[-1][:, after:].mean(0), torch.logsumexp(logits, -1)[:, after:].mean(0)
