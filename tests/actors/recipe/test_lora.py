"""What a recipe may say about adapters, and what it is told when that cannot be."""

from pathlib import Path

import pytest

from actors.recipe.file import RecipeError, dump_recipe, load_recipe
from actors.recipe.policy import LoraConfig
from actors.recipe.pools import used_pools
from actors.recipe.preference import PreferenceRecipe
from actors.recipe.schema import GrpoRecipe

ROOT = Path(__file__).parents[3]
GRPO, SFT = ROOT / "recipes/demo.yaml", ROOT / "recipes/demo_sft.yaml"


def test_every_weight_is_trained_unless_the_recipe_says_otherwise() -> None:
    assert load_recipe(GRPO).policy.lora is None


@pytest.mark.parametrize("path", [GRPO, SFT], ids=lambda path: path.stem)
def test_adapters_are_read_and_written_unchanged(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["policy.lora.r=8", "policy.lora.target_modules=[q_proj, v_proj]"])
    assert recipe.policy.lora == LoraConfig(r=8, target_modules=("q_proj", "v_proj"))
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_defaults_adapt_every_linear_layer() -> None:
    lora = load_recipe(GRPO, ["policy.lora={}"]).policy.lora
    assert lora is not None
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.0, "all-linear")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("policy.lora.rank=8", "policy.lora.rank: unknown key; valid keys: r, lora_alpha"),
        ("policy.lora.r=0", "policy.lora.r: 0 is out of range; it must be at least 1"),
        ("policy.lora.r=1024", "policy.lora.r: 1024 is out of range; it must be at most 512"),
        ("policy.lora.target_modules=[]", "policy.lora.target_modules: write all-linear, or a list"),
        ("policy.lora.target_modules=q_proj", "policy.lora.target_modules: write all-linear, or a list"),
        ("policy.lora.target_modules=[1]", "policy.lora.target_modules: write all-linear, or a list"),
        ("policy.lora.lora_dropout=1.0", "policy.lora.lora_dropout: 1.0 is out of range; it must be less than 1"),
        (
            "policy.lora.lora_dropout=0.1",
            "policy.lora.lora_dropout: 0.1 would make the policy differ from the replicas",
        ),
        ("policy.lora=true", "policy.lora: true is not a mapping"),
    ],
)
def test_what_cannot_be_is_named_with_the_fix(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(GRPO, [override])
    assert expected in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


QUANTIZED = ["policy.lora.quantize=nf4", "policy.dtype=bfloat16"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_base_of_four_bits_is_read(gpus: int) -> None:
    lora = load_recipe(GRPO, [*QUANTIZED, f"pools.policy.gpus_per_worker={gpus}"]).policy.lora
    assert lora is not None
    assert lora.quantize == "nf4"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("policy.dtype=float32", "policy.lora.quantize: nf4 is computed in bfloat16, and dtype is float32"),
        ("policy.zero_stage=3", "policy.lora.quantize: ZeRO-3 would shard weights of four bits"),
        ("policy.lora.quantize=int8", "policy.lora.quantize: 'int8'"),
    ],
)
def test_where_four_bits_cannot_be_they_are_refused(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(GRPO, [*QUANTIZED, override])
    assert expected in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_supervised_recipes_may_have_dropout() -> None:
    assert load_recipe(SFT, ["policy.lora.lora_dropout=0.1"]).policy.lora is not None


REFERENCE = "reference={kind: pretrained, path: somewhere}"


@pytest.mark.parametrize(
    ("overrides", "below", "pool"),
    [
        (["algorithm.beta=0.1", "policy.lora={}"], True, False),
        (["algorithm.beta=0.1", "policy.lora={}", REFERENCE], False, True),
        (["algorithm.beta=0.1"], False, True),
        (["policy.lora={}"], False, False),
    ],
    ids=["below", "named", "whole", "none"],
)
def test_a_reference_below_the_adapter_needs_no_worker(overrides: list[str], below: bool, pool: bool) -> None:
    recipe = load_recipe(GRPO, overrides)
    assert isinstance(recipe, GrpoRecipe)
    assert recipe.reference_below == below
    assert ("reference" in used_pools(recipe)) == pool


@pytest.mark.parametrize(("name", "below"), [("dpo", True), ("kto", True), ("orpo", False), ("cpo", False)])
def test_preferences_compare_with_the_base_where_there_is_an_adapter(name: str, below: bool) -> None:
    path = ROOT / f"recipes/offline/{name}.yaml"
    whole, adapted = load_recipe(path), load_recipe(path, ["policy.lora={}"])
    assert isinstance(whole, PreferenceRecipe)
    assert isinstance(adapted, PreferenceRecipe)
    assert not whole.reference_below
    assert adapted.reference_below == below


def test_an_optimizer_on_the_host_needs_zero() -> None:
    assert load_recipe(GRPO, ["policy.offload={}"]).policy.offload is not None
    with pytest.raises(RecipeError, match=r"policy.offload: .*set zero_stage to 1 or more"):
        load_recipe(GRPO, ["policy.offload={optimizer: cpu}", "policy.zero_stage=0"])


def test_weights_on_the_host_need_zero_3() -> None:
    offload = load_recipe(GRPO, ["policy.offload={parameters: cpu}", "policy.zero_stage=3"]).policy.offload
    assert offload is not None
    assert (offload.optimizer, offload.parameters) == ("cpu", "cpu")
    with pytest.raises(RecipeError, match=r"policy.offload.parameters: only ZeRO-3 .*zero_stage is 1; set zero_stage"):
        load_recipe(GRPO, ["policy.offload={parameters: cpu}"])
