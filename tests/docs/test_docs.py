"""What the pages say is so: keys and files exist, commands run, TRL's names are TRL's, figures are computed."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from actors.recipe.file import load_recipe
from actors.recipe.schema import GrpoRecipe, OfflineKind
from deploy.__main__ import app
from tests.docs.recipe_keys import page

ROOT = Path(__file__).parents[2]
GUIDES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = GUIDES | {path.name: path.read_text("utf-8") for path in sorted(ROOT.glob("*.md"))}
BASE = "recipes/qwen2.5_7b.yaml"


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every dotted key that a recipe of this kind may have; an entry of a list has no index here."""
    for name, field in model.model_fields.items():
        yield above + name
        for inner in models_in(field.annotation):
            yield from keys_of(inner, f"{above}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType, tuple):
        for argument in typing.get_args(annotation):
            yield from models_in(argument)


KEYS = {key for kind in (GrpoRecipe, *typing.get_args(OfflineKind)) for key in keys_of(kind)}
ROOTS = {key for key in KEYS if "." not in key}
FILE = re.compile(r"[\w./-]+\.(py|md|yaml|txt|cpu|jsonl)|deploy/Dockerfile")


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The rows of each table, by the heads of their columns."""
    for found in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines())
        yield [dict(zip(head, row, strict=True)) for row in rows]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `python -m deploy` in the guide's shell blocks, without what the shell does with it."""
    for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("python -m deploy "):
                yield shlex.split(line.partition(" > ")[0].replace('"$IMAGE"', "registry/paceline:1"), comments=True)[
                    3:
                ]


COMMANDS = [(name, arguments) for name, text in GUIDES.items() for arguments in commands(text)]


def test_there_is_something_to_check() -> None:
    assert {"kuberay.md", "sizing.md", "moving.md"} <= set(GUIDES)
    assert len(COMMANDS) >= 8
    assert {"pools.policy.num_workers", "rewards.functions.function", "checkpoint.best.metric", "max_length"} <= KEYS
    assert sum(len(rows) for rows in tables(GUIDES["moving.md"])) >= 50


@pytest.mark.parametrize("name", PAGES)
def test_every_key_that_a_page_names_is_a_recipe_s(name: str) -> None:
    for span in spans(PAGES[name]):
        key = re.split("[=:]", span)[0]
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) and key.split(".")[0] in ROOTS and not FILE.fullmatch(key):
            is_foreign = re.search(rf"`{re.escape(span)}`[^|\n]*\|[^|\n]*\|\s*$", PAGES[name], flags=re.M)
            assert key in KEYS or (is_foreign and name == "moving.md"), f"{name}: {span}"


def test_the_guide_to_the_keys_is_written_from_the_recipes() -> None:
    assert GUIDES["recipe.md"] == page(), "write it again: python -m tests.docs.recipe_keys > docs/recipe.md"


def test_the_column_of_ours_holds_keys_and_no_key_twice() -> None:
    ours = [row["Paceline"].strip("`") for rows in tables(GUIDES["moving.md"]) for row in rows]
    assert [key for key in ours if key not in KEYS] == []
    assert len(set(ours)) == len(ours)


def test_the_column_of_trl_holds_its_knobs() -> None:
    from trl import GRPOConfig
    from trl.experimental.async_grpo import AsyncGRPOConfig

    known = {field.name for config in (GRPOConfig, AsyncGRPOConfig) for field in dataclasses.fields(config)}
    theirs = [
        name for rows in tables(GUIDES["moving.md"]) for row in rows for name in re.findall("`(.*?)`", row["TRL"])
    ]
    assert len(theirs) >= 30
    assert [name for name in theirs if name not in known] == []


def test_the_columns_of_others_look_like_theirs() -> None:
    for rows in tables(GUIDES["moving.md"]):
        for row in rows:
            for flag in re.findall("`(.*?)`", row["OpenRLHF"]):
                assert re.fullmatch(r"--[a-z]+(\.[a-z_]+)+", flag), flag
            for key in re.findall("`(.*?)`", row["verl"]):
                assert re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", key), key


@pytest.mark.parametrize("name", GUIDES)
def test_values_that_a_guide_proposes_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for span in spans(GUIDES[name]):
        key, equals, value = span.partition("=")
        if equals and key in KEYS and not re.search("[A-Z]", value):
            load_recipe(BASE, (span, "staleness.in_flight_updates=true"))


@pytest.mark.parametrize("name", PAGES)
def test_files_and_links_lead_somewhere(name: str) -> None:
    for span in spans(PAGES[name]):
        if FILE.fullmatch(span) and "/" in span:
            assert (ROOT / span).exists(), f"{name}: {span}"
    for link in re.findall(r"\]\(([^)#]+)", PAGES[name]):
        folder = ROOT / "docs" if name in GUIDES else ROOT
        assert "://" in link or (folder / link).exists(), f"{name}: {link}"


@pytest.mark.parametrize(
    ("name", "arguments"),
    COMMANDS,
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else value,
)
def test_a_command_has_a_verb_and_options_that_exist(name: str, arguments: list[str]) -> None:
    verbs: Any = typer.main.get_command(app)
    verb = verbs.commands[arguments[0]]
    with verb.make_context(arguments[0], list(arguments[1:])) as context:
        given = context.params
    if given.get("recipe") is not None:
        load_recipe(ROOT / given["recipe"], given.get("overrides") or [])
    elif "run" in given:
        assert given["run"] in (None, load_recipe(ROOT / BASE).name)


@pytest.mark.parametrize("arguments", commands(PAGES["README.md"]), ids=" ".join)
def test_a_command_of_the_readme_has_a_verb_and_options_that_exist(arguments: list[str]) -> None:
    verbs: Any = typer.main.get_command(app)
    verbs.commands[arguments[0]].make_context(arguments[0], list(arguments[1:])).close()


def test_the_recipe_of_the_readme_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGES["README.md"], flags=re.M | re.S)
    (tmp_path / "my.yaml").write_text(text)
    assert load_recipe(tmp_path / "my.yaml").name == "my-run"


@pytest.mark.parametrize(
    "arguments", [arguments for _, arguments in COMMANDS if arguments[0] in ("plan", "manifest")], ids=" ".join
)
def test_a_command_that_starts_nothing_runs(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy", *arguments]
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_of_submit_and_its_kin_exist() -> None:
    verbs: Any = typer.main.get_command(app)
    kin = ("train", "submit", "status", "logs", "stop")
    known = {option for verb in kin for parameter in verbs.commands[verb].params for option in parameter.opts}
    named = {span.split()[0] for span in spans(GUIDES["multi_node.md"]) if span.startswith("--")}
    of_ray = {"--num-gpus=0"}
    assert len(named) >= 6
    assert named <= known | of_ray


def test_options_of_the_manifest_exist() -> None:
    verbs: Any = typer.main.get_command(app)
    known = {option for parameter in verbs.commands["manifest"].params for option in parameter.opts}
    named = {span for span in spans(GUIDES["kuberay.md"]) if span.startswith("--")}
    assert len(named) >= 12
    assert named <= known


def test_the_table_of_sizes_is_what_plan_computes(tmp_path: Path) -> None:
    from deploy.memory import policy_load, rollout_load
    from deploy.shapes import model_shape
    from placement.memory.fit import sequences, total
    from placement.memory.footprint import GB, policy_footprint
    from tests.recipes.test_sizes import RECIPES, sized

    computed = {}
    for path in RECIPES:
        case = sized(path, tmp_path)
        shape = model_shape(case.recipe)
        assert shape is not None
        policy = total(policy_footprint(shape, policy_load(case.recipe, shape))) / GB
        held = sequences(shape, rollout_load(case.recipe, shape), case.gpu_gb * GB)
        computed[path.stem] = (str(case.num_nodes * case.gpus), f"{policy:.1f}", str(held))
    (rows,) = (rows for rows in tables(GUIDES["sizing.md"]) if "GPUs of 80 GB" in rows[0])
    told = {row["recipe"]: (row["GPUs of 80 GB"], row["policy"], row["sequences"]) for row in rows}
    assert told == computed
