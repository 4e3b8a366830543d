"""Inputs that are wrong by construction, each of which must be refused in words: `python -m tests.chaos.bad_inputs`.

A seed makes the same inputs again. Recipes are every recipe that ships with one thing spoiled; rows are files of a data
set; checkpoints are a whole one with one thing spoiled. Refused means a ValueError that names what was spoiled.
"""

import argparse
import copy
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import annotated_types as at
import yaml
from pydantic import BaseModel

from actors.recipe.errors import _kind, _models
from actors.recipe.file import load_recipe
from actors.recipe.plain_yaml import parse
from actors.recipe.pools import used_pools
from actors.recipe.schema import Recipe
from placement.cluster import uniform
from placement.plan import plan
from tests.chaos.bad_files import bad_checkpoint, bad_rows, digest

ROOT = Path(__file__).parents[2]
NONSENSE = {"zz_nonsense": [1]}
FREE = ("dataset", "task")
"""A mapping in which any key may stand."""
KINDS = {str(_kind(model)): model for model in _models(Recipe)}
"""What a recipe of each `kind` may say."""
Recipes = dict[str, list[tuple[Path, dict[str, Any]]]]
"""By `kind`: where each is, and what it says."""
_TRIES = 50
"""So often an input is made anew that has been there before."""


@dataclass(frozen=True, slots=True)
class BadInput:
    """`intake` must raise a ValueError whose message has all `words`."""

    label: str
    intake: Callable[[], object]
    words: tuple[str, ...] = ()
    identity: str = ""
    """Two inputs that are equal have it in common."""


@dataclass(slots=True)
class Verdicts:
    """What became of the inputs."""

    inputs: int = 0
    identities: set[str] = field(default_factory=set)
    tracebacks: int = 0
    silent_accepts: int = 0
    unclear: int = 0
    """Refused by a message that does not name what was spoiled."""
    kinds: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def judge(self, bad: BadInput) -> None:
        self.inputs += 1
        self.identities.add(bad.identity)
        self.kinds[bad.label.partition(":")[0]] += 1
        try:
            bad.intake()
        except ValueError as error:
            if missing := [word for word in bad.words if word not in str(error)]:
                self.unclear += 1
                self.notes.append(f"{bad.label}: {error} does not say {missing}")
        except BaseException as error:  # noqa: BLE001  any other is a traceback to the user
            self.tracebacks += 1
            self.notes.append(f"{bad.label}: {type(error).__name__}: {error}")
        else:
            self.silent_accepts += 1
            self.notes.append(f"{bad.label}: accepted")

    @property
    def distinct(self) -> int:
        """How many of them were not the same as another."""
        return len(self.identities)

    def to_json(self) -> dict[str, int]:
        names = "inputs", "distinct", "tracebacks", "silent_accepts", "unclear"
        return {name: getattr(self, name) for name in names}


def try_all(count: int, seed: int, folder: Path) -> Verdicts:
    """`count` inputs: most are recipes, every tenth a file of rows, every twentieth a checkpoint.

    Half of the recipes sample, which have most keys; of the others each kind has its turn as often as every other.
    One that was there before is made anew, as long as there are others.
    """
    rng = random.Random(seed)
    recipes = by_kind()
    verdicts = Verdicts()
    for number in range(count):
        for _ in range(_TRIES):
            bad = _made(number, rng, recipes, folder)
            if bad.identity not in verdicts.identities:
                break
        verdicts.judge(bad)
    return verdicts


def _made(number: int, rng: random.Random, recipes: Recipes, folder: Path) -> BadInput:
    if number % 20 == 7:
        return BadInput(*bad_checkpoint(rng, folder))
    if number % 10 == 3:
        return BadInput(*bad_rows(rng, folder))
    kind = "grpo" if rng.random() < 0.5 else rng.choice(sorted(recipes.keys() - {"grpo"}))
    path, tree = rng.choice(recipes[kind])
    return rng.choice(SPOILERS)(rng, copy.deepcopy(tree), folder / path.name)


def by_kind() -> Recipes:
    """Every recipe that ships."""
    found: Recipes = {}
    for path in sorted((ROOT / "recipes").rglob("*.yaml")):
        tree = parse(path.read_text())
        found.setdefault(tree["kind"], []).append((path, tree))
    return found


# Recipes -------------------------------------------------------------------------------------------------------------


def unknown_key(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    where, mapping = rng.choice(list(_mappings(tree)))
    name = f"zz_{rng.randrange(1000)}"
    mapping[name] = rng.choice([1, "x", None, [], {}])
    return _file("unknown key", where, tree, path, name)


def typo(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    """A key with one letter doubled, which is no other key."""
    where, mapping = rng.choice([(where, mapping) for where, mapping in _mappings(tree) if mapping])
    key = rng.choice(sorted(mapping))
    index = rng.randrange(len(key))
    name = key[:index] + key[index] * 2 + key[index:]
    mapping[name] = mapping.pop(key)
    return _file("typo", where, tree, path, name if key != "kind" else "kind")


def wrong_type(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    """A mapping of nonsense stands where a value, a list or another mapping must."""
    key, _ = rng.choice(list(_fields(tree)))
    _set(tree, key, NONSENSE)
    return _file("wrong type", key, tree, path, key[-1] if key[-1] != "kind" else "kind")


def wrong_scalar(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    """Text or a list where a number or a boolean must stand."""
    numbers = [key for key, info in _fields(tree) if info.annotation in (int, float, bool)]
    key = rng.choice(numbers)
    _set(tree, key, rng.choice(["many", "1 0", "0x", "--1", [1], [[]], "yes please"]))
    return _file("wrong scalar", key, tree, path, key[-1])


def out_of_range(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    bounded = [(key, value) for key, info in _fields(tree) for value in _beyond(info.metadata)]
    key, value = rng.choice(bounded)
    _set(tree, key, value)
    return _file("out of range", key, tree, path, key[-1])


def missing(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    required = {"kind", "name", "steps", "model", "dataset", "groups_per_batch", "rewards", "batch_size"}
    name = rng.choice(sorted(required & tree.keys()))
    del tree[name]
    return _file("missing", (name,), tree, path, name)


def wrong_kind(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    if rng.random() < 0.5:
        tree["kind"] = rng.choice(["ppo", "GRPO", "sft " if tree["kind"] == "grpo" else "grpo ", ""])
        return _file("wrong kind", ("kind",), tree, path, "kind")
    tree["model"]["kind"] = rng.choice(["tinny", "huge", "Recipe", "none", ""])
    return _file("wrong kind", ("model", "kind"), tree, path, "model.kind")


def other_kind(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    """Keys of a kind that samples under the name of one that does not, or the other way round."""
    tree["kind"] = rng.choice(sorted(KINDS.keys() - {"grpo"})) if tree["kind"] == "grpo" else "grpo"
    return _file("other kind", ("kind",), tree, path, "batch")


def impossible_placement(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    pool = rng.choice(["policy", "rollout", "reward"] if tree["kind"] == "grpo" else ["policy"])
    key, value = rng.choice([("cpus_per_worker", 4097.0), ("node_resource", "unobtainium"), ("num_workers", 100_000)])
    if pool == "policy" and key == "num_workers":
        key, value = "cpus_per_worker", 4097.0  # a batch cannot feed so many ranks, which is another error
    tree.setdefault("pools", {}).setdefault(pool, {})[key] = value
    path.write_text(yaml.safe_dump(tree))

    def intake() -> object:
        return plan(used_pools(load_recipe(path)), uniform(4, 32.0, 8))

    return BadInput(f"impossible placement: {path.name}: {pool}.{key}", intake, (pool,), digest(path.read_bytes()))


def contradiction(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    """Keys that are right alone and wrong together."""
    changes = _contradictions(rng, tree) if tree["kind"] == "grpo" else _offline_contradictions(rng, tree)
    name = rng.choice(sorted(changes))
    change, key = changes[name]
    return _file(f"contradiction ({name})", (key,), _laid_over(tree, change), path, key)


def _offline_contradictions(rng: random.Random, tree: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """What is changed, and the key that must be named."""
    kind = tree["kind"]
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "ranks": ({"pools": {"policy": {"num_workers": tree["batch_size"] + rng.randrange(1, 9)}}}, "batch_size"),
        "best of none": ({"checkpoint": {"every": 0, "best": {"metric": "loss", "mode": "min"}}}, "best"),
        "two GPUs": ({"pools": {"policy": {"gpus_per_worker": rng.randrange(2, 9)}}}, "gpus_per_worker"),
    }
    if kind == "sft":
        changes["no reward"] = ({"checkpoint": {"best": {"metric": "reward"}}}, "metric")
    else:
        lora = {"lora_dropout": rng.choice([0.1, 0.5])}
        changes["dropout"] = ({"policy": {"lora": lora}}, "lora" if kind == "reward" else "lora_dropout")
    if kind == "kto":
        changes["alone"] = ({"batch_size": 1, "algorithm": {"loss_type": "kto"}}, "batch_size")
    return changes


def _contradictions(rng: random.Random, tree: dict[str, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """The same of a recipe that samples; what its method allows, or refuses for another reason, is left out."""
    algorithm = tree.get("algorithm", {})
    method = {"distillation", "online_dpo"} & tree.keys()
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "one rollout": ({"algorithm": {"num_generations": 1}}, "num_generations"),
        "stale": (
            {
                "algorithm": {"old_logprobs": "recomputed", "vllm_importance_sampling_correction": False},
                "staleness": {"max_staleness": 3},
            },
            "max_staleness",
        ),
        "twice": (
            {"algorithm": {"old_logprobs": "sampled", "vllm_importance_sampling_correction": True}},
            "old_logprobs",
        ),
        "mask": ({"staleness": {"max_staleness": 0, "when_stale": "mask"}}, "when_stale"),
        "shallow": ({"staleness": {"pipeline_depth": rng.randrange(1, tree["groups_per_batch"])}}, "pipeline_depth"),
        "band": ({"staleness": {"adapt_depth": {"ess_low": 0.9, "ess_high": 0.5}}}, "ess_low"),
        "kl": ({"staleness": {"adapt_depth": {"kl_max": 0.5}}, "algorithm": {"beta": 0.0}}, "kl_max"),
        "dropout": ({"policy": {"lora": {"lora_dropout": 0.5}}}, "lora_dropout"),
        "ranks": ({"pools": {"policy": {"num_workers": 10_000}}}, "groups_per_batch"),
        "two GPUs": ({"pools": {"policy": {"gpus_per_worker": 2}}}, "gpus_per_worker"),
        "wire": (
            {"sync": {"transport": "nccl"}, "pools": {"rollout": {"gpus_per_worker": 0, "colocate_with": None}}},
            "transport",
        ),
        "delta": ({"sync": {"delta": True, "staging": "none"}}, "delta"),
        "fanout": ({"sync": {"fanout": rng.choice([0, -1, "some", 1.5])}}, "fanout"),
        "filter": (
            {"algorithm": {"dynamic_sampling": {"kind": "reward_band", "min": 1.0, "max": rng.random()}}},
            "min",
        ),
    }
    if method or "kl_penalty" in algorithm:
        del changes["kl"]  # its beta cannot be 0 at all, or nothing is measured
    if algorithm.get("baseline") == "none":
        del changes["one rollout"]  # which needs no other
    return changes


def broken_yaml(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    """A line that is no YAML, or a document that is no recipe."""
    lines = yaml.safe_dump(tree).splitlines()
    top = [index for index, line in enumerate(lines) if line[0] not in " -"]
    at_line = rng.choice(top)
    spoiled: list[bytes] = [
        "\n".join(
            [*lines[:at_line], rng.choice(["a: [1, 2", 'b: "open', "c: {d: 1", "\td: 1", "e: *nobody"]), ""]
        ).encode(),
        "\n".join([*lines, lines[at_line].partition(":")[0] + ": 1"]).encode(),
        "\n".join([*lines, "7: seven"]).encode(),
        "\n".join([*lines, "f: !!python/object/apply:os.system [true]"]).encode(),
        "\n".join([*lines, "g: !!set {a, b}"]).encode(),
        "\n".join([*lines, "---", *lines]).encode(),
        "\n".join([*lines, "h: .inf\x00"]).encode(),
        "\n".join(f"- {line}" for line in lines if ":" not in line).encode() or b"- 1",
        b"",
        b"# nothing but words\n",
        b"just words",
        bytes([0xFF, 0xFE, rng.randrange(256)]) + yaml.safe_dump(tree).encode(),
        yaml.safe_dump(tree).encode() + bytes([0xC3, 0x28]),
        b"[" * rng.randrange(1, 3000),
        b"a: &a [*a]",
    ]
    index = rng.randrange(len(spoiled))
    path.write_bytes(spoiled[index])
    label = f"broken YAML: {path.name}: form {index}"
    return BadInput(label, lambda: load_recipe(path), (path.name,), digest(spoiled[index]))


def bad_override(rng: random.Random, tree: dict[str, Any], path: Path) -> BadInput:
    texts = [
        "steps", "=3", ".steps=3", "steps.=3", "steps..x=3", "steps.x=3", "name.x=1", "steps=[", "steps={a: 1",
        "model.kind.x=1", "zz=1", "model.zz=1", "steps=", "steps=true", "steps=1.5", "steps='1'", "seed=-1", "name=Big",
        "name=-x", "pools.zz.num_workers=1", "optimizer.learning_rate=0", "steps=*a", "steps=!!int 3x", "steps=1e999",
    ]  # fmt: skip
    if tree["kind"] == "grpo":
        texts += [
            "rewards.functions.9.weight=1", "rewards.functions.-1.weight=1", "rewards.functions.x.weight=1",
            "rewards.functions=[]", "rewards.functions.0=f", "rewards=3", "staleness.when_stale=drop",
        ]  # fmt: skip
    text = rng.choice(texts)
    path.write_text(yaml.safe_dump(tree))
    label, key = f"bad override: {path.name}: {text}", text.partition("=")[0]
    return BadInput(label, lambda: load_recipe(path, [text]), (key,), digest(path.read_bytes(), text.encode()))


SPOILERS = (
    unknown_key, typo, wrong_type, wrong_scalar, out_of_range, missing, wrong_kind, other_kind, impossible_placement,
    contradiction, broken_yaml, bad_override,
)  # fmt: skip

Key = tuple[str | int, ...]


def _file(label: str, key: Key, tree: Any, path: Path, *words: object) -> BadInput:
    path.write_text(yaml.safe_dump(tree))
    where = ".".join(map(str, key))
    words = (path.name, *map(str, words))
    return BadInput(f"{label}: {path.name}: {where}", lambda: load_recipe(path), words, digest(path.read_bytes()))


def _mappings(tree: Any, key: Key = ()) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Every mapping whose keys are known."""
    if isinstance(tree, dict) and key != FREE:
        yield key, tree
        for name, inner in tree.items():
            yield from _mappings(inner, (*key, name))
    elif isinstance(tree, list):
        for index, inner in enumerate(tree):
            yield from _mappings(inner, (*key, index))


def _fields(tree: dict[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Every key that may stand in the recipe, with what pydantic knows of it."""
    yield from _fields_of(KINDS[tree["kind"]], tree, ())


def _fields_of(model: type[BaseModel], tree: Any, above: Key) -> Iterator[tuple[Key, Any]]:
    for name, info in model.model_fields.items():
        key = (*above, name)
        if key == FREE:
            continue
        yield key, info
        models = _models(info.annotation)
        inner = tree.get(name) if isinstance(tree, dict) else None
        if len(models) > 1:
            kinds = inner.get("kind") if isinstance(inner, dict) else None
            models = tuple(m for m in models if kinds in getattr(m.model_fields["kind"].annotation, "__args__", ()))
        for below in models:
            # An optional part that is left out has keys of its own that it cannot do without.
            if inner is not None or all(not field.is_required() for field in below.model_fields.values()):
                yield from _fields_of(below, inner, key)


def _beyond(metadata: list[Any]) -> Iterator[float]:
    for bound in metadata:
        match bound:
            case at.Ge(ge=limit):
                yield limit - 1
            case at.Gt(gt=limit):
                yield limit
            case at.Le(le=limit):
                yield limit + 1
            case at.Lt(lt=limit):
                yield limit


def _set(tree: dict[str, Any], key: Key, value: Any) -> None:
    spot: Any = tree
    for part in key[:-1]:
        if spot.get(part) is None:
            spot[part] = {}
        spot = spot[part]
    spot[key[-1]] = value


def _laid_over(tree: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    for name, value in change.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _laid_over(tree[name], value)
        else:
            tree[name] = value
    return tree


def main(arguments: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.bad_inputs", description=__doc__)
    parser.add_argument("--inputs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    try:
        verdicts = try_all(given.inputs, given.seed, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for kind, count in verdicts.kinds.most_common():
        print(f"{kind:<32} {count}")
    for note in itertools.islice(verdicts.notes, 30):
        print(note)
    print(json.dumps(verdicts.to_json()), flush=True)
    return verdicts.to_json()


if __name__ == "__main__":
    counts = main()
    sys.exit(counts["tracebacks"] + counts["silent_accepts"] + counts["unclear"] > 0)
