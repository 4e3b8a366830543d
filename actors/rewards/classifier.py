"""A reward model scores a completion on the token ids that it was trained on, made by the same function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from actors.data.examples import answered
from actors.data.prompts import prompt_ids
from actors.model.load import load_tokenizer
from algorithms.types import Messages

_BATCH = 16
"""Sequences that are padded and scored at once."""


def check_reward_model(path: str) -> None:
    """ValueError when the folder or hub name is no sequence classifier with one label; its weights are not loaded."""
    load_tokenizer_of(path)
    config = AutoConfig.from_pretrained(path)
    architectures = config.architectures or ["none"]
    if config.num_labels != 1 or not architectures[0].endswith("ForSequenceClassification"):
        raise ValueError(
            f"rewards.functions: model: '{path}' is a {architectures[0]} with {config.num_labels} labels, and a reward "
            "model is a sequence classifier with one; a recipe of kind 'reward' leaves one in runs/<name>/model"
        )


def load_tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """The reward model's own tokenizer; ValueError as in `check_reward_model`."""
    try:
        return load_tokenizer(path, None, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(str(error).replace("model.path:", "rewards.functions: model:")) from error


def reward_model(path: str) -> Callable[..., list[float]]:
    """The model as a function that is called as TRL calls reward functions."""
    check_reward_model(path)
    tokenizer = load_tokenizer_of(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    model = model.to(device).eval()
    assert tokenizer.pad_token_id is not None
    if model.config.pad_token_id is None or model.config.pad_token_id < 0:  # some models say -1, which is no token
        model.config.pad_token_id = tokenizer.pad_token_id

    def scores(prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any) -> list[float]:
        """One score for each completion."""
        sequences = [_token_ids(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for start in range(0, len(sequences), _BATCH):
            some = sequences[start : start + _BATCH]
            longest = max(map(len, some))
            ids_SL = torch.full((len(some), longest), model.config.pad_token_id)
            for place, token_ids in enumerate(some):
                ids_SL[place, : len(token_ids)] = torch.tensor(token_ids)
            lengths_S1 = torch.tensor([[len(token_ids)] for token_ids in some])
            mask_SL = (torch.arange(longest) < lengths_S1).long()
            with torch.no_grad():
                logits_S1 = model(input_ids=ids_SL.to(device), attention_mask=mask_SL.to(device)).logits
            found += logits_S1[:, 0].float().tolist()
        return found

    return scores


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, completion: str | Messages) -> list[int]:
    """Line breaks at the beginning of an answer that merge with those of the chat template are left out: the model was
    trained on no such answer, and the others of the group would lose their scores, too."""
    given = prompt_ids(tokenizer, prompt, "rewards")
    try:
        return answered(tokenizer, prompt, given, completion, "rewards")[0]
    except ValueError:
        begun = _begun(completion)
        if begun == completion:
            raise
        return answered(tokenizer, prompt, given, begun, "rewards")[0]


def _begun(completion: str | Messages) -> str | Messages:
    """Without the blanks that a conversation's answer begins with."""
    if isinstance(completion, str):
        return completion
    first, *others = completion
    return [{**first, "content": first["content"].lstrip()}, *others]
