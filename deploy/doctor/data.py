"""The data set can be read and becomes prompts, and the tokenizer does to them what the model has learned."""

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from actors.data.chat import assistant_tokens
from actors.data.dataset import Rows, load_rows, reward_column_names
from actors.data.prompts import PromptStream, conversation_ids, text_ids
from actors.model.load import load_tokenizer, stop_token_ids
from actors.recipe.file import load_recipe
from actors.recipe.model import RecipeModel, TinyModel
from actors.recipe.schema import Recipe
from actors.run.folder import RunFolder
from actors.settings import ModelSource, source_of
from algorithms.types import Messages
from deploy.columns import needed_columns
from deploy.doctor.check import Finding, failed, passed, skipped, warned
from deploy.train import stream_of, words

_TALK: Messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
_MEASURED = 64
_UNREADABLE = "the data set could not be read"


def check_model(recipe: Recipe) -> Finding:
    """The tokenizer and the config of the model that the recipe begins with are here, or can be had."""
    tokenizer, num_positions = words(recipe)
    source = first_model(recipe)
    name = "a tiny model" if isinstance(source, TinyModel) else source.path
    return passed(f"{name}: {len(tokenizer)} tokens, {num_positions} positions")


def check_dataset(recipe: Recipe) -> Finding:
    """The first rows are read; the columns that the recipe learns from are there."""
    rows = load_rows(recipe.dataset, needed_columns(recipe))
    for index in range(min(2, len(rows))):
        rows.row(index)
    rest = reward_column_names(rows.column_names)
    others = f", and {', '.join(rest[:8])} for reward functions" if recipe.kind == "grpo" and rest else ""
    needed = ", ".join(needed_columns(recipe)) or "messages"
    return passed(f"{rows.source}: {len(rows)} rows with {needed}{others}")


def check_prompts(recipe: Recipe) -> Finding:
    """The first rows are tokenized as the run will do it, and fit into the model."""
    rows = rows_of(recipe)
    if rows is None:
        return skipped(_UNREADABLE)
    tokenizer, num_positions = words(recipe)
    stream = stream_of(recipe, rows, tokenizer, num_positions)
    if not isinstance(stream, PromptStream):
        return passed(f"the first {min(256, len(rows))} rows become sequences that fit into {num_positions} positions")
    lengths = []
    for ordinal in range(min(_MEASURED, len(rows))):
        with contextlib.suppress(ValueError):  # of the rows that dataset.max_bad_rows allows to be bad
            lengths.append(len(stream.prompt(ordinal).token_ids))
    return passed(
        f"the first {min(256, len(rows))} rows become prompts, the longest of {len(lengths)} of them "
        f"{max(lengths, default=0)} tokens (generation.max_prompt_length: {stream.max_prompt_length})"
    )


def rows_of(recipe: Recipe) -> Rows | None:
    """None where they cannot be read, which `check_dataset` tells."""
    try:
        return load_rows(recipe.dataset, needed_columns(recipe))
    except ValueError:
        return None


def check_tokenizer(recipe: Recipe) -> Finding:
    """The tokenizer that the policy begins with, as its files have it, against the model's config and its stops."""
    rows = rows_of(recipe)
    chats = rows is not None and talks(rows.row(0))
    source = first_model(recipe)
    tokenizer, _ = words(recipe)
    if isinstance(source, TinyModel):
        return judged(tokenizer, chats)
    place = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    whole = load_tokenizer(source.path, source.revision, source.trust_remote_code)
    raw: Any = AutoTokenizer.from_pretrained(source.path, **place)
    raw.chat_template = tokenizer.chat_template
    config: Any = AutoConfig.from_pretrained(source.path, **place)
    stops = stop_token_ids(source.path, whole, source.revision)
    return judged(raw, chats, int(config.get_text_config().vocab_size), stops)


def first_model(recipe: Recipe) -> TinyModel | ModelSource:
    """The model that the recipe begins with, or, where that has yet to be trained, the one that this begins with."""
    match recipe.model:
        case TinyModel() as tiny:
            return tiny
        case RecipeModel(recipe=path) if not RunFolder(load_recipe(path).folder).finished:
            return first_model(load_recipe(path))
        case _ as model:
            return source_of(model)


def talks(row: Mapping[str, Any]) -> bool:
    """Whether the row holds a conversation."""
    return any(isinstance(row.get(name), list) for name in ("prompt", "messages", "chosen"))


def judged(
    tokenizer: PreTrainedTokenizerBase,
    chats: bool,
    num_embeddings: int | None = None,
    stops: Collection[int] | None = None,
) -> Finding:
    """`chats`: prompts are conversations; `num_embeddings` and `stops` are None where they are ours."""
    if chats and not tokenizer.chat_template:
        return failed(
            "prompts are conversations, and the tokenizer has no chat template",
            "use an instruct model, or give it one: model.chat_template, or chat_template.jinja in its folder",
        )
    bos = tokenizer.bos_token_id
    text = text_ids(tokenizer, "Hello", "a text", special_tokens=True)
    if bos is not None and text.count(bos) > 1:
        return failed(
            f"the tokenizer begins a text with {text.count(bos)} BOS tokens '{tokenizer.bos_token}'",
            "repair add_bos_token or the post-processor in the model's tokenizer files",
        )
    if text[-1] == tokenizer.eos_token_id:
        return failed(
            f"the tokenizer ends a text with EOS '{tokenizer.eos_token}', so nothing would follow a prompt",
            "set add_eos_token to false in the model's tokenizer_config.json",
        )
    if num_embeddings is not None and len(tokenizer) > num_embeddings:
        return failed(
            f"the tokenizer has {len(tokenizer)} tokens, and the model embeds {num_embeddings}",
            "take tokenizer and model from the same place",
        )
    if chats and (finding := _judged_template(tokenizer, stops)) is not None:
        return finding
    if tokenizer.pad_token_id is None:
        return warned(
            f"the tokenizer has no padding token; EOS '{tokenizer.eos_token}' stands in its place",
            "set pad_token in the model's tokenizer_config.json, if another program is to pad what is trained",
        )
    chat = "has a chat template" if tokenizer.chat_template else "has no chat template, and prompts need none"
    return passed(f"{len(tokenizer)} tokens, {'no BOS' if bos is None else 'one BOS'}; {chat}")


def _judged_template(tokenizer: PreTrainedTokenizerBase, stops: Collection[int] | None) -> Finding | None:
    """What is wrong with the chat template; None when nothing is."""
    opened = conversation_ids(tokenizer, _TALK[:1], "the chat template", add_generation_prompt=True)
    bos = tokenizer.bos_token_id
    if bos is not None and opened.count(bos) > 1:
        return failed(
            f"the chat template renders {opened.count(bos)} BOS tokens '{tokenizer.bos_token}'",
            "remove one from the template, or from the tokenizer that adds it again",
        )
    try:
        token_ids, said = assistant_tokens(tokenizer, _TALK, "the chat template")
    except ValueError:
        return None  # a template that shows turns differently when others follow: only supervised runs mind
    last = max(index for index, is_said in enumerate(said) if is_said)
    if stops is not None and token_ids[last] not in stops:
        closing = tokenizer.decode([token_ids[last]])
        return warned(
            f"the assistant's turn closes with '{closing}', and generation does not stop there: completions would run "
            "to their limit",
            "add the token to eos_token_id in the model's generation_config.json",
        )
    return None
