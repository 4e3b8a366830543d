"""A tiny model loads everywhere, spells every text byte by byte, and depends on its config and seed alone."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.model.load import load_causal_lm, load_tokenizer, max_model_length
from actors.model.tiny import SPECIAL_TOKENS, byte_tokenizer, make_tiny_model
from actors.recipe.model import TinyModel

SMALL = TinyModel(kind="tiny", hidden_size=64, num_layers=1, num_heads=2)
TOKENIZER = byte_tokenizer(max_length=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(SMALL, folder, seed=3)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    random_state = torch.random.get_rng_state()
    make_tiny_model(SMALL, tmp_path / "again", seed=3)
    make_tiny_model(SMALL, tmp_path / "other", seed=4)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert contents(tmp_path / "again") == contents(folder)
    changed = {name for name, data in contents(tmp_path / "other").items() if data != contents(folder)[name]}
    assert changed == {"model.safetensors"}
    # Nothing half-written stays behind.
    assert {entry.name for entry in tmp_path.iterdir()} == {"again", "other"}


def test_default_sizes_fit_vllm(tmp_path: Path) -> None:
    make_tiny_model(TinyModel(kind="tiny"), tmp_path / "model", seed=0)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (64, 320, 256)


def test_loads_as_a_hugging_face_model(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size % 64 == 0
    assert (model.config.vocab_size, len(tokenizer)) == (320, 260)
    assert model.generation_config.eos_token_id == [
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
    encoded = tokenizer("hello", return_tensors="pt")
    generated = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= 5 + 4


def test_padding_of_the_vocabulary_decodes_to_nothing() -> None:
    assert TOKENIZER.decode([97, 260, 319, 98]) == "ab"


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_tied(tmp_path: Path, tied: bool) -> None:
    make_tiny_model(SMALL.model_copy(update={"tie_word_embeddings": tied}), tmp_path / "model", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_token_is_a_byte() -> None:
    assert TOKENIZER("hé🙂")["input_ids"] == list("hé🙂".encode())
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [256, 257, 258, 259]
    assert (TOKENIZER.pad_token, TOKENIZER.eos_token, TOKENIZER.bos_token) == ("<pad>", "<eos>", None)
    assert TOKENIZER("")["input_ids"] == []


@given(st.text())
@settings(max_examples=300)
def test_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_awkward_text_comes_back(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    generator = random.Random(0)
    awkward = [
        "",
        " ",
        "  a  b ",
        "it 's . ok , I 'm",
        "\x00\x7f\x80\xff",
        "\r\n\t",
        "<eos> <|im_end|>",
        "שלום 中文 🏳️‍🌈",
    ]
    awkward += ["".join(chr(generator.randrange(0x20, 0xD800)) for _ in range(50)) for _ in range(50)]
    for text in awkward:
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_chat_template_is_chatml() -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    prompt = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
    full = TOKENIZER.apply_chat_template([*messages, {"role": "assistant", "content": "ho"}], tokenize=False)
    assert full == prompt + "ho<|im_end|>\n"


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"num_heads": 3}, "model.num_heads"), ({"num_heads": 4, "hidden_size": 96}, "model.hidden_size")],
)
def test_sizes_that_do_not_fit_are_named(tmp_path: Path, changes: dict[str, int], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make_tiny_model(SMALL.model_copy(update=changes), tmp_path / "model", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_model_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not empty"):
        make_tiny_model(SMALL, folder, seed=3)
    (tmp_path / "empty").mkdir()
    make_tiny_model(SMALL, tmp_path / "empty", seed=3)
    assert contents(tmp_path / "empty") == contents(folder)


def test_loaders(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), None, False)
    assert tokenizer("ab")["input_ids"] == [97, 98]
    model = load_causal_lm(str(folder), None, False, "bfloat16", attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_causal_lm(str(folder), None, False, "float32").config._attn_implementation == "sdpa"
    assert max_model_length(str(folder), None, False) == 256


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "there is no folder '/no/such/folder'"),
        ("./no-such-folder", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("bad name!", "neither a folder here nor a model that the hub gives"),
        ("tests", "the folder 'tests' holds no"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(path: str, message: str) -> None:
    for load in (
        lambda: load_tokenizer(path, None, False),
        lambda: load_causal_lm(path, None, False, "float32"),
        lambda: max_model_length(path, None, False),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_tokens_that_are_missing(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(256)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    assert load_tokenizer(str(tmp_path / "no_pad"), None, False).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*set eos_token"):
        load_tokenizer(str(tmp_path / "no_eos"), None, False)
