"""Data that a run would stumble over are told, and tokenizers that do to them what no model has learned."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from actors.model.tiny import byte_tokenizer
from deploy.doctor.check import Check, Finding, found_by
from deploy.doctor.data import check_dataset, check_model, check_prompts, check_tokenizer, judged, talks
from tests.actors.data.families import FAMILIES
from tests.deploy.doctor.recipes import recipe_of

CHAT = [{"prompt": [{"role": "user", "content": "Two and two?"}], "answer": "4"}]
MISTRAL = FAMILIES["Mistral"]


def with_pad(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def framed(before: str, after: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts these tokens around every text."""
    tokenizer = with_pad(MISTRAL.tokenizer())
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def test_rows_and_columns_are_told(tmp_path: Path) -> None:
    found = check_dataset(recipe_of(tmp_path))
    assert found.level == "pass"
    assert found.text.endswith("rows.jsonl: 2 rows with prompt, and answer for reward functions")


@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        ([{"question": "a", "answer": "b"}], (), "has no column 'prompt'"),
        ([{"prompt": "a", "completions": "b"}], (), "the column 'completions' bears the name"),
        ([{"prompt": "a"}], ("dataset.size=9",), "dataset.size: 9 rows"),
        ([{"prompt": "a"}], ("dataset.path=nowhere.jsonl",), "there is no file nowhere.jsonl"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_told(
    tmp_path: Path, rows: list[dict[str, Any]], overrides: tuple[str, ...], said: str
) -> None:
    recipe = recipe_of(tmp_path, *overrides, rows=rows)
    found = found_by(Check("dataset", 60.0, lambda: check_dataset(recipe)))
    assert (found.level, said in found.text) == ("fail", True), found
    assert check_prompts(recipe) == Finding("skip", "the data set could not be read")


def test_prompts_are_measured(tmp_path: Path) -> None:
    assert "the longest of 2 of them 15 tokens" in check_prompts(recipe_of(tmp_path)).text


def test_a_prompt_that_is_too_long_is_told_with_its_row(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "generation.max_prompt_length=10")
    found = found_by(Check("prompts", 60.0, lambda: check_prompts(recipe)))
    assert found.level == "fail"
    assert "row 0: the prompt has 15 tokens" in found.text


def test_a_row_that_may_be_bad_is_not_measured(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "generation.max_prompt_length=10", "dataset.max_bad_rows=1")
    assert "the longest of 1 of them 5 tokens" in check_prompts(recipe).text


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_families_of_chat_models_are_sane(family: Any) -> None:
    tokenizer = with_pad(family.tokenizer())
    stops = {tokenizer.convert_tokens_to_ids(family.closes)}
    assert judged(tokenizer, chats=True, num_embeddings=300, stops=stops).level == "pass"


@pytest.mark.parametrize(
    ("tokenizer", "chats", "level", "said"),
    [
        (framed("<s> <s>", ""), False, "fail", "begins a text with 2 BOS tokens '<s>'"),
        (framed("<s>", "</s>"), False, "fail", "ends a text with EOS '</s>'"),
        (framed("<s>", ""), False, "pass", "one BOS"),
        (with_pad(MISTRAL.tokenizer("{{ bos_token }}" + MISTRAL.template)), True, "fail", "template renders 2 BOS"),
        (with_pad(MISTRAL.tokenizer("{{ bos_token }}" + MISTRAL.template)), False, "pass", "one BOS"),
        (MISTRAL.tokenizer(), True, "warn", "no padding token; EOS '</s>'"),
    ],
    ids=["two BOS", "EOS behind", "one BOS", "two BOS of the template", "a template that is not used", "no padding"],
)
def test_a_tokenizer_that_does_what_no_model_has_learned_is_told(
    tokenizer: PreTrainedTokenizerFast, chats: bool, level: str, said: str
) -> None:
    found = judged(tokenizer, chats)
    assert found.level == level
    assert said in found.text


def test_conversations_need_a_template() -> None:
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = None
    assert judged(tokenizer, chats=False).level == "pass"
    found = judged(tokenizer, chats=True)
    assert (found.level, "chat_template.jinja" in found.fix) == ("fail", True)


def test_a_turn_that_generation_does_not_stop_at_is_told() -> None:
    tokenizer = byte_tokenizer(64)
    assert judged(tokenizer, chats=True, stops={tokenizer.eos_token_id}).level == "warn"
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert judged(tokenizer, chats=True, stops={tokenizer.eos_token_id, closing}).level == "pass"
    assert judged(tokenizer, chats=False, stops={tokenizer.eos_token_id}).level == "pass"


def test_more_tokens_than_embeddings_are_told() -> None:
    tokenizer = byte_tokenizer(64)
    assert judged(tokenizer, chats=False, num_embeddings=len(tokenizer)).level == "pass"
    found = judged(tokenizer, chats=False, num_embeddings=len(tokenizer) - 1)
    assert found.level == "fail"
    assert found.text == "the tokenizer has 260 tokens, and the model embeds 259"


def test_a_model_is_told_by_what_it_reads(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    assert check_model(recipe_of(tmp_path)).text == "a tiny model: 260 tokens, 256 positions"
    there = recipe_of(tmp_path, f"model={{kind: pretrained, path: {tiny_models['tied']}}}")
    assert check_model(there).text == f"{tiny_models['tied']}: 260 tokens, 256 positions"
    missing = recipe_of(tmp_path, f"model={{kind: pretrained, path: {tmp_path}/none}}")
    found = found_by(Check("model", 60.0, lambda: check_model(missing)))
    assert (found.level, "model.path" in found.text) == ("fail", True)


def test_the_files_of_a_model_are_looked_at(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """As they are: another program's padding is not ours to add."""
    shutil.copytree(tiny_models["tied"], tmp_path / "model")
    recipe = recipe_of(tmp_path, f"model={{kind: pretrained, path: {tmp_path}/model}}", rows=CHAT)
    assert check_tokenizer(recipe).level == "pass"
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    assert "has no padding token" in check_tokenizer(recipe).text
    (tmp_path / "model" / "generation_config.json").unlink()
    assert "generation does not stop there" in check_tokenizer(recipe).text


def test_a_template_of_the_recipes_own_is_judged(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    """Also where the model is here: not that of its folder."""
    (tmp_path / "own.jinja").write_text(MISTRAL.template.replace("eos_token", "'<|im_start|>'"))
    model = f"{{kind: pretrained, path: {tiny_models['tied']}, chat_template: {tmp_path}/own.jinja}}"
    found = check_tokenizer(recipe_of(tmp_path, f"model={model}", rows=CHAT))
    assert "closes with '<|im_start|>', and generation does not stop there" in found.text


def test_the_tokenizer_of_a_model_that_is_yet_to_be_trained_is_the_one_it_begins_with(tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    first.write_text(Path("recipes/demo_sft.yaml").read_text() + f"run_dir: {tmp_path}/first\n")
    recipe = recipe_of(tmp_path, f"model={{kind: recipe, recipe: {first}}}", rows=CHAT)
    assert check_tokenizer(recipe).text == "260 tokens, no BOS; has a chat template"


def test_rows_that_hold_conversations_are_known() -> None:
    assert talks(CHAT[0])
    assert talks({"messages": []})
    assert not talks({"prompt": "text", "answer": ["a"]})
