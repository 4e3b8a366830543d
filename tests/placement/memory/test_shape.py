"""Parameters are counted as the models' authors and transformers count them."""

from typing import Any

import pytest

from actors.model.lora import adapt
from actors.model.tiny import tiny_skeleton
from actors.recipe.model import TinyModel
from actors.recipe.policy import LoraConfig
from placement.memory.shape import ModelShape, shape_of


def config(
    model_type: str, layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **more,
    }


TIED = {"tie_word_embeddings": True}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
PUBLISHED = {
    "Qwen2.5-0.5B": (config("qwen2", 24, 896, 4864, 14, 2, 151936, **TIED), 494_032_768),
    "Qwen2.5-1.5B": (config("qwen2", 28, 1536, 8960, 12, 2, 151936, **TIED), 1_543_714_304),
    "Qwen2.5-7B": (config("qwen2", 28, 3584, 18944, 28, 4, 152064), 7_615_616_512),
    "Qwen2.5-32B": (config("qwen2", 64, 5120, 27648, 40, 8, 152064), 32_763_876_352),
    "Qwen2.5-72B": (config("qwen2", 80, 8192, 29568, 64, 8, 152064), 72_706_203_648),
    "Qwen3-8B": (config("qwen3", 36, 4096, 12288, 32, 8, 151936, head_dim=128), 8_190_735_360),
    "Qwen3-30B-A3B": (config("qwen3_moe", 48, 2048, 6144, 32, 4, 151936, **EXPERTS), 30_532_122_624),
    "Llama-3.2-1B": (config("llama", 16, 2048, 8192, 32, 8, 128256, head_dim=64, **TIED), 1_235_814_400),
    "Llama-3.1-8B": (config("llama", 32, 4096, 14336, 32, 8, 128256), 8_030_261_248),
    "Llama-3.3-70B": (config("llama", 80, 8192, 28672, 64, 8, 128256), 70_553_706_496),
    "Mixtral-8x7B": (
        config("mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
        46_702_792_704,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_parameters_that_its_authors_say(name: str) -> None:
    told, parameters = PUBLISHED[name]
    assert shape_of(told).num_parameters == parameters


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_has_the_parameters_that_transformers_makes(tied: bool) -> None:
    model = tiny_skeleton(TinyModel(kind="tiny", hidden_size=192, num_layers=3, num_heads=3, tie_word_embeddings=tied))
    assert shape_of(model.config.to_dict()).num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "v_proj"), ("down_proj",)])
def test_adapters_have_the_parameters_that_peft_makes(modules: Any) -> None:
    model = tiny_skeleton(TinyModel(kind="tiny", hidden_size=128, num_layers=2, num_heads=2))
    shape = shape_of(model.config.to_dict())
    adapt(model, LoraConfig(r=8, target_modules=modules))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.adapter_parameters(8, None if modules == "all-linear" else modules) == trained


def test_the_text_model_of_a_larger_one_counts() -> None:
    told, parameters = PUBLISHED["Qwen2.5-7B"]
    assert shape_of({"model_type": "other", "text_config": told}).num_parameters == parameters


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "12", 0, True])
def test_a_key_that_is_not_said_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"does not say {key}"):
        shape_of(PUBLISHED["Qwen2.5-7B"][0] | {key: value})


def test_layers_of_other_kinds_are_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"not counted here \(kv_lora_rank\)"):
        shape_of(PUBLISHED["Qwen2.5-7B"][0] | {"kv_lora_rank": 512})


def test_heads_default_to_the_attention_s() -> None:
    told = {key: value for key, value in PUBLISHED["Llama-3.1-8B"][0].items() if key != "num_key_value_heads"}
    shape = shape_of(told)
    assert isinstance(shape, ModelShape)
    assert (shape.num_kv_heads, shape.head_dim) == (32, 128)
