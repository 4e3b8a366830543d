"""Every recipe that ships is read and written unchanged, and every mistake is named with its file, key and fix."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.recipe.errors import all_keys
from actors.recipe.file import RecipeError, dump_recipe, load_recipe
from actors.recipe.model import FirstPretrained, TinyModel
from actors.recipe.plain_yaml import PlainYamlError, parse, write
from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe, Recipe, SftRecipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

GRPO: dict[str, Any] = {
    "kind": "grpo",
    "name": "x",
    "steps": 10,
    "groups_per_batch": 4,
    "model": {"kind": "tiny"},
    "dataset": {"path": "rows.jsonl"},
    "rewards": {"functions": [{"function": "rewards.py:score"}, {"function": "rewards.py:form", "weight": 0.5}]},
}
SFT: dict[str, Any] = {
    "kind": "sft",
    "name": "x",
    "steps": 10,
    "batch_size": 4,
    "model": {"kind": "pretrained", "path": "some/model"},
    "dataset": {"path": "rows.jsonl"},
}

KINDS = "'grpo', 'sft', 'dpo', 'orpo', 'cpo', 'reward', 'kto'"


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `recipes/x.yaml` (GRPO) and `recipes/sft.yaml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    Path("recipes/x.yaml").write_text(yaml.safe_dump(GRPO))
    Path("recipes/sft.yaml").write_text(yaml.safe_dump(SFT))
    return tmp_path / "recipes"


def refusal(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    text = str(error.value)
    assert "Value error" not in text
    assert "pydantic" not in text
    return text.splitlines()


# ---- What is read


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_that_ship_are_read_and_written_unchanged(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    written = (tmp_path / "recipe.yaml").read_text()
    assert "\nkind: " in written
    assert "!!" not in written


def test_awkward_values_are_written_and_read_unchanged(recipes: Path) -> None:
    recipe = load_recipe(
        "recipes/x.yaml",
        [
            r'dataset.prompt_suffix="\n: #é \"quoted\" 1e-3"',
            "dataset.task={a: '1e-3', b: ['no', '2001-01-01', '', ' ', null, 1e-7, -0.0, 1e20], '1': '~'}",
            "optimizer.learning_rate=1e-6",
            "run_dir=some folder/run",
            "dataset.name='123'",
            "logging.wandb_project='<<'",
        ],
    )
    dump_recipe(recipe, "recipes/again.yaml")
    assert load_recipe("recipes/again.yaml") == recipe
    assert recipe.dataset.task["b"] == ["no", "2001-01-01", "", " ", None, 1e-7, -0.0, 1e20]
    assert recipe.dataset.prompt_suffix == '\n: #é "quoted" 1e-3'


OVERRIDES: list[tuple[str, str, Any]] = [
    ("steps=7", "steps", 7),
    (" steps = 7", "steps", 7),
    ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
    ("optimizer.learning_rate=1E-3", "optimizer.learning_rate", 1e-3),
    ("optimizer.learning_rate=.5", "optimizer.learning_rate", 0.5),
    ("optimizer.weight_decay=1", "optimizer.weight_decay", 1.0),
    ("dataset.size=1_000", "dataset.size", 1000),
    ("algorithm.epsilon_high=null", "algorithm.epsilon_high", None),
    ("algorithm.epsilon_high=", "algorithm.epsilon_high", None),
    ("algorithm.scale_rewards=none", "algorithm.scale_rewards", "none"),
    ("dataset.shuffle=false", "dataset.shuffle", False),
    ("dataset.split=no", "dataset.split", "no"),
    ("dataset.split=train[:10%]", "dataset.split", "train[:10%]"),
    ("dataset.split=a=b", "dataset.split", "a=b"),
    ("dataset.revision=2024-01-01", "dataset.revision", "2024-01-01"),
    ("dataset.revision=12:30:00", "dataset.revision", "12:30:00"),
    ("dataset.task.min_word_len=3", "dataset.task", {"min_word_len": 3}),
    ("model={kind: pretrained, path: a/b}", "model", FirstPretrained(kind="pretrained", path="a/b")),
    ("model.hidden_size=64", "model", TinyModel(kind="tiny", hidden_size=64)),
    ("run_dir=runs/y", "run_dir", Path("runs/y")),
]


@pytest.mark.parametrize(("override", "key", "expected"), OVERRIDES, ids=[row[0] for row in OVERRIDES])
def test_an_override_sets_one_value(recipes: Path, override: str, key: str, expected: Any) -> None:
    value: Any = load_recipe("recipes/x.yaml", [override])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_reach_into_lists_and_the_last_one_wins(recipes: Path) -> None:
    recipe = load_recipe("recipes/x.yaml", ["rewards.functions.0.weight=2", "rewards.functions.0.weight=3", "steps=1"])
    assert isinstance(recipe, GrpoRecipe)
    assert [reward.weight for reward in recipe.rewards.functions] == [3.0, 0.5]
    assert recipe.steps == 1


def test_an_override_changes_one_place_of_a_shared_anchor(recipes: Path) -> None:
    path = recipes / "anchor.yaml"
    path.write_text(yaml.safe_dump(GRPO) + "pools:\n  policy: &cpu {cpus_per_worker: 0.5}\n  reward: *cpu\n")
    pools = load_recipe(path, ["pools.policy.cpus_per_worker=2"]).pools
    assert (pools.policy.cpus_per_worker, pools.reward.cpus_per_worker) == (2.0, 0.5)


def test_numbers_in_files_are_read_as_in_overrides(recipes: Path) -> None:
    path = recipes / "numbers.yaml"
    path.write_text(yaml.safe_dump(GRPO) + "optimizer: {learning_rate: 1e-3, max_grad_norm: 1}\nseed: 0x10\n")
    recipe = load_recipe(path)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.max_grad_norm, recipe.seed) == (1e-3, 1.0, 16)


def test_pools_without_work_are_not_placed(recipes: Path) -> None:
    assert list(used_pools(load_recipe("recipes/sft.yaml"))) == ["policy"]
    assert list(used_pools(load_recipe("recipes/x.yaml"))) == ["policy", "reward", "rollout"]
    with_kl = load_recipe("recipes/x.yaml", ["algorithm.beta=0.1"])
    assert list(used_pools(with_kl)) == ["policy", "reference", "reward", "rollout"]
    assert isinstance(load_recipe("recipes/sft.yaml"), SftRecipe)


# ---- What is refused


VALUES = {
    # Unknown keys.
    "staleness.max_stalenes=2": "staleness.max_stalenes: unknown key; did you mean 'max_staleness'?",
    "stalness.max_staleness=2": "stalness: unknown key; did you mean 'staleness'?",
    "max_staleness=2": "max_staleness: unknown key; did you mean 'staleness.max_staleness'?",
    "sync.zzz=2": "sync.zzz: unknown key; valid keys: transport, staging, fanout, bucket_mb, delta, full_every,",
    "model.path=a/b": "model.path: unknown key; it belongs to kind 'pretrained', and this is kind 'tiny'; valid keys",
    "batch_size=4": "batch_size: unknown key; it belongs to kind 'sft', and this is kind 'grpo'; valid",
    "rewards.functions.1.wieght=2": "rewards.functions.1.wieght: unknown key; did you mean 'weight'?",
    "model.num_layer=2": "model.num_layer: unknown key; did you mean 'num_layers'?",
    # Wrong types.
    "steps=many": "steps: 'many' is not an integer; write a whole number such as 8",
    "steps=true": "steps: true is not an integer",
    "steps='100'": "steps: '100' is not an integer; remove the quotes",
    "steps=1e3": "steps: 1000.0 is not an integer; write 1000",
    "steps=1.5": "steps: 1.5 is not an integer; write a whole number",
    "steps=": "steps: is empty, which is not an integer",
    "steps=[1]": "steps: a list is not an integer",
    "steps={a: 1}": "steps: a mapping is not an integer",
    "dataset.size=big": "dataset.size: 'big' is not an integer; write a whole number such as 8, or null",
    "optimizer.learning_rate=high": "optimizer.learning_rate: 'high' is not a number; write one such as 0.5",
    "optimizer.learning_rate='1e-3'": "optimizer.learning_rate: '1e-3' is not a number; remove the quotes",
    "optimizer.learning_rate=.inf": "optimizer.learning_rate: '.inf' is not a number",
    "algorithm.beta=false": "algorithm.beta: false is not a number",
    "dataset.shuffle=yes": "dataset.shuffle: 'yes' is not a boolean; write true or false",
    "dataset.shuffle=1": "dataset.shuffle: 1 is not a boolean; write true or false",
    "dataset.path=12": "dataset.path: 12 is not a string; put it in quotes: '12'",
    "dataset.path=true": "dataset.path: true is not a string; put it in quotes: 'true'",
    "run_dir=3": "run_dir: 3 is not a path; put it in quotes: '3', or null",
    "staleness=": "staleness: is empty, which is not a mapping",
    "staleness=3": "staleness: 3 is not a mapping; write its keys as 'key: value'",
    "model=tiny": "model: 'tiny' is not a mapping",
    "rewards.functions={a: 1}": "rewards.functions: a mapping is not a list",
    "dataset.task=[1]": "dataset.task: a list is not a mapping",
    # Out of range, or not in the list.
    "steps=0": "steps: 0 is out of range; it must be at least 1",
    "rewards.max_memory_gb=0": "rewards.max_memory_gb: 0 is out of range; it must be greater than 0",
    "checkpoint.keep=1": "checkpoint.keep: 1 is out of range; it must be at least 2",
    "algorithm.epsilon=1.5": "algorithm.epsilon: 1.5 is out of range; it must be less than 1",
    "optimizer.learning_rate=0": "optimizer.learning_rate: 0 is out of range; it must be greater than 0",
    "generation.top_p=2": "generation.top_p: 2 is out of range; it must be at most 1",
    "model.num_layers=0": "model.num_layers: 0 is out of range",
    "algorithm.loss_type=drgrpo": "algorithm.loss_type: 'drgrpo' is not one of 'grpo', 'dr_grpo', 'dapo', 'bnpo', "
    "'cispo'; did you mean 'dr_grpo'?",
    "policy={zero_stage: 0, dtype: bfloat16}": "policy.zero_stage: DeepSpeed has no stage 0 for bfloat16 weights",
    "policy.zero_stage=4": "policy.zero_stage: 4 is out of range; it must be at most 3",
    "kind=gropo": f"kind: 'gropo' is not one of {KINDS}; did you mean 'grpo'?",
    "kind=": f"kind: null is not one of {KINDS}",
    "kind=[grpo]": f"kind: a list is not one of {KINDS}",
    "model.kind=tny": "model.kind: 'tny' is not one of 'pretrained', 'tiny', 'recipe'; did you mean 'tiny'?",
    "model={hidden_size: 64}": "model.kind: required, but missing; add it: one of 'pretrained', 'tiny', 'recipe'",
    "name=My Run": "name: 'My Run' is not of the right form; it must match ^",
    "rewards.functions=[]": "rewards.functions: the list has too few entries; write at least 1",
    "dataset.path=''": "dataset.path: the text is too short",
    # Missing.
    "model={kind: pretrained}": "model.path: required, but missing; add it: a string",
    "rewards={timeout_s: 3}": "rewards.functions: required, but missing; add it: a list",
    "rewards.functions=[{weight: 1}]": "rewards.functions.0: write either function: 'path/to/file.py:name' or model: ",
    # What the models themselves say.
    "algorithm.num_generations=1": "algorithm.num_generations: the advantage is measured against the group's mean",
    "generation.top_p=0.95": "generation.top_p: 0.95 samples from a part of the distribution, so whole rollouts "
    "look off policy to algorithm.vllm_importance_sampling_mode 'sequence_mask'; set top_p to 1, or the mode to ",
    "generation.top_k=50": "generation.top_k: 50 samples from a part of the distribution",
    "staleness.pipeline_depth=2": "staleness.pipeline_depth: 2 groups in flight can never fill a batch of 4",
}


@pytest.mark.parametrize(("override", "expected"), VALUES.items(), ids=VALUES.keys())
def test_a_bad_override_is_named_as_the_source(recipes: Path, override: str, expected: str) -> None:
    (line,) = refusal("recipes/x.yaml", override)
    assert line.startswith(f"override {override!r}: {expected}")


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"staleness": {"max_stalenes": 2}},
        "recipes/bad.yaml: staleness.max_stalenes: unknown key; did you mean 'max_staleness'?",
    ),
    "wrong type": ({"steps": "many"}, "recipes/bad.yaml: steps: 'many' is not an integer"),
    "in a list": (
        {"rewards": {"functions": [{"function": "a:b", "weight": "x"}]}},
        "recipes/bad.yaml: rewards.functions.0.weight: 'x' is not a number",
    ),
    "in a union": ({"model": {"kind": "recipe", "recipe": 3}}, "recipes/bad.yaml: model.recipe: 3 is not a string"),
    "own check of the algorithm": (
        {"algorithm": {"num_generations": 1}},
        "recipes/bad.yaml: algorithm.num_generations: the advantage is measured against",
    ),
    "own check across sections": (
        {"algorithm": {"vllm_importance_sampling_correction": False}},
        "recipes/bad.yaml: staleness.max_staleness: 1 trains on stale samples without an off-policy correction",
    ),
    "own check of the recipe": (
        {"pools": {"policy": {"num_workers": 64}}},
        "recipes/bad.yaml: groups_per_batch: a batch of 32 rollouts cannot feed 64 policy ranks",
    ),
    "a wire without its devices": (
        {"sync": {"transport": "nccl"}},
        "recipes/bad.yaml: sync.transport: nccl goes from GPU to GPU, and the policy pool has none; set sync.transport",
    ),
    "changes of nothing": (
        {"sync": {"delta": True, "staging": "none"}},
        "recipes/bad.yaml: sync.delta: changes are applied to the version before, which staging 'none' does not keep",
    ),
    "unknown kind": ({"kind": "ppo"}, f"recipes/bad.yaml: kind: 'ppo' is not one of {KINDS}"),
    "long values are cut": ({"steps": "x" * 500}, "recipes/bad.yaml: steps: 'xxxxxxxx"),
}


@pytest.mark.parametrize(("change", "expected"), FILES.values(), ids=FILES.keys())
def test_a_bad_file_is_named_as_the_source(recipes: Path, change: dict[str, Any], expected: str) -> None:
    Path("recipes/bad.yaml").write_text(yaml.safe_dump(GRPO | change))
    (line,) = refusal("recipes/bad.yaml")
    assert line.startswith(expected)
    assert len(line) < 300


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("kind", f"kind: required, but missing; add it: one of {KINDS}"),
        ("steps", "steps: required, but missing; add it: an integer (Updates of the policy)"),
        ("model", "model: required, but missing; add it: a mapping with 'kind'"),
        ("rewards", "rewards: required, but missing; add it: a mapping with 'functions'"),
    ],
)
def test_a_missing_key_is_named(recipes: Path, key: str, expected: str) -> None:
    Path("recipes/bad.yaml").write_text(yaml.safe_dump({name: value for name, value in GRPO.items() if name != key}))
    assert refusal("recipes/bad.yaml") == [f"recipes/bad.yaml: {expected}"]


TEXTS = {
    "": "recipes/bad.yaml: is empty; a recipe begins with its kind, such as 'kind: grpo' or 'kind: sft'",
    "# only a comment\n": "recipes/bad.yaml: is empty",
    "- a\n- b\n": "recipes/bad.yaml: holds a list where a recipe is a mapping",
    "grpo\n": "recipes/bad.yaml: holds 'grpo' where a recipe is a mapping",
    "kind: grpo\nsteps: [1, 2\nname: x\n": "recipes/bad.yaml: line 3: invalid YAML: while parsing a flow sequence",
    "kind: grpo\nname: a: b\n": "recipes/bad.yaml: line 2: invalid YAML: mapping values are not allowed here",
    "kind: grpo\n\tname: x\n": "recipes/bad.yaml: line 2: invalid YAML",
    "kind: grpo\nsteps: 1\nname: x\nsteps: 2\n": "recipes/bad.yaml: line 4: duplicate key 'steps', first on line 2",
    "pools:\n  policy: {num_workers: 1, num_workers: 2}\n": "recipes/bad.yaml: line 2: duplicate key 'num_workers'",
    "kind: grpo\n1: x\n": "recipes/bad.yaml: line 2: the key '1' is not a string; put it in quotes",
    "kind: !!python/name:os.system\n": "recipes/bad.yaml: line 1: invalid YAML: could not determine a constructor",
    "kind: !!set {a}\n": "recipes/bad.yaml: line 1: invalid YAML: could not determine a constructor",
    "kind: grpo\n---\nkind: sft\n": "recipes/bad.yaml: line 2: invalid YAML: expected a single document",
    "kind: grpo\nsteps: 1e999\n": "recipes/bad.yaml: invalid YAML: Out of range float",
    "kind: grpo\nmodel: &m [*m]\n": "recipes/bad.yaml: invalid YAML: Circular reference",
    "kind: *nothing\n": "recipes/bad.yaml: line 1: invalid YAML: found undefined alias",
    "kind: \x00\n": "recipes/bad.yaml: invalid YAML: unacceptable character",
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.items(), ids=map(repr, TEXTS))
def test_a_file_that_is_no_mapping_is_refused(recipes: Path, text: str, expected: str) -> None:
    Path("recipes/bad.yaml").write_text(text)
    (line,) = refusal("recipes/bad.yaml", "steps=1")
    assert line.startswith(expected)


def test_files_that_cannot_be_read_are_named(recipes: Path) -> None:
    assert refusal("recipes/y.yaml") == ["recipes/y.yaml: no such file; recipes in recipes: sft.yaml, x.yaml"]
    assert refusal("nowhere/y.yaml") == ["nowhere/y.yaml: no such file; there is no folder nowhere"]
    assert refusal("y.yaml") == ["y.yaml: no such file; there are no recipes in ."]
    assert refusal("recipes") == ["recipes: is a folder; name a recipe file in it"]
    Path("recipes/latin.yaml").write_bytes(b"name: \xe9\n")
    assert refusal("recipes/latin.yaml") == ["recipes/latin.yaml: is not UTF-8 text (byte 6); save it as UTF-8"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "write it as dotted.key=value"),
        ("=3", "write it as dotted.key=value"),
        ("a..b=3", "write it as dotted.key=value"),
        ("steps.=3", "write it as dotted.key=value"),
        ("steps=[1", "invalid YAML"),
        ("model={a: 1, a: 2}", "duplicate key 'a'"),
        ("steps.x=3", "steps: is 10, which has no keys; set steps as a whole"),
        ("rewards.functions.2.weight=3", "rewards.functions: there is no '2' in this list; it has the indices 0 to 1"),
        ("rewards.functions.-1.weight=3", "rewards.functions: there is no '-1' in this list"),
        ("rewards.functions.weight=3", "rewards.functions: there is no 'weight' in this list"),
    ],
)
def test_an_override_that_cannot_be_laid_over_is_refused(recipes: Path, override: str, expected: str) -> None:
    (line,) = refusal("recipes/x.yaml", override)
    assert line.startswith(f"override {override!r}: {expected}")


def test_all_errors_are_told_each_with_its_source(recipes: Path) -> None:
    Path("recipes/bad.yaml").write_text(yaml.safe_dump(GRPO | {"steps": "many", "sede": 3, "sync": {"timeout_s": 0}}))
    assert refusal("recipes/bad.yaml", "rewards.functions.0.weight=heavy", "nonsense", "staleness.x=1") == [
        "override 'nonsense': write it as dotted.key=value, such as steps=100",
        "recipes/bad.yaml: steps: 'many' is not an integer; write a whole number such as 8",
        "override 'staleness.x=1': staleness.x: unknown key; valid keys: max_staleness, pipeline_depth, when_stale, "
        "over_sampling, adapt_depth, in_flight_updates, kv_cache",
        "override 'rewards.functions.0.weight=heavy': rewards.functions.0.weight: 'heavy' is not a number; "
        "write one such as 0.5",
        "recipes/bad.yaml: sync.timeout_s: 0 is out of range; it must be greater than 0",
        "recipes/bad.yaml: sede: unknown key; did you mean 'seed'?",
    ]


# ---- The YAML underneath


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.5e+3", 1500.0),
        ("-1E5", -1e5),
        ("1.", 1.0),
        ("0x1f", 31),
        ("-7", -7),
        ("010", "010"),
        ("1:30", "1:30"),
        ("on", "on"),
        ("No", "No"),
        ("True", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ],
)
def test_scalars_are_those_of_yaml_1_2_and_survive_writing(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)
    assert parse(write(value)) == value
    assert parse(write({"key": str(text)})) == {"key": text}


def test_an_alias_in_a_merge_is_no_duplicate_key() -> None:
    assert parse("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}")["c"] == {"x": 2, "y": 3}
    with pytest.raises(PlainYamlError, match="duplicate key 'x'") as error:
        parse("a:\n  x: 1\n  x: 2")
    assert error.value.line == 3


# ---- Anything else


SCALARS = st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=5)
PLAIN = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=5), below, max_size=2),
    max_leaves=5,
)
KEYS = sorted({*all_keys(GrpoRecipe), *all_keys(SftRecipe)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    overrides=st.lists(
        st.text(max_size=8)
        | st.tuples(st.sampled_from(KEYS), PLAIN).map(lambda pair: f"{pair[0]}={write(pair[1])}")
        | st.tuples(st.sampled_from(KEYS), st.text(max_size=6)).map("=".join)
        | st.tuples(st.sampled_from(KEYS), st.sampled_from(KEYS), SCALARS).map(
            lambda t: f"{t[0]}.{t[1]}={write(t[2])}"
        ),
        max_size=4,
    )
)
def test_whatever_is_written_is_a_recipe_or_is_refused_in_words(recipes: Path, overrides: list[str]) -> None:
    for name in ("recipes/x.yaml", "recipes/sft.yaml"):
        outcome = attempt(name, overrides)
        if isinstance(outcome, str):
            assert outcome
            assert "is refused" not in outcome, "an error of pydantic without words of ours"
        else:
            dump_recipe(outcome, "recipes/fuzzed.yaml")
            assert load_recipe("recipes/fuzzed.yaml") == outcome


def attempt(path: str, overrides: list[str]) -> Recipe | str:
    try:
        return load_recipe(path, overrides)
    except RecipeError as error:
        return str(error)
