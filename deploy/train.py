"""`python -m deploy train`: everything that can be wrong with a recipe is found before anything is started."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from actors.dataset import Rows, load_rows, reward_column_names
from actors.examples import ExampleStream
from actors.grpo_run import run_grpo
from actors.lineage import trained_before
from actors.model import load_tokenizer, max_model_length
from actors.pools import used_pools
from actors.progress import RunProgress
from actors.prompts import PromptStream
from actors.recipe import GrpoRecipe, PretrainedModel, Recipe, RecipeModel, SftRecipe, TinyModel
from actors.recipe_file import load_recipe
from actors.reward_functions import check_reward
from actors.run_folder import RunFolder
from actors.sft_run import run_sft
from actors.tiny_model import make_tiny_model
from actors.workers import ModelSource
from placement.cluster import ClusterSpec, from_ray, this_machine
from placement.groups import reserve
from placement.plan import plan

_RESERVE_TIMEOUT_S = 120.0


def train(recipe: Recipe, path: str, address: str | None, overwrite: bool, console: Console) -> None:
    """Run the recipe and, first, those that its model comes from; ValueError for what the user can mend.

    `path` is where the recipe was read, for messages.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    runs = [recipe for _, recipe in trained_before(recipe, path)] + [recipe]
    cluster = this_machine() if address is None else None
    for index, run in enumerate(runs):
        check(run, cluster, model_exists=index == 0)
    RunFolder(recipe.folder).check_free(overwrite)
    with ray_session(address):
        for run in runs:
            _run(run, overwrite=overwrite or run is not recipe, console=console)


def check(recipe: Recipe, cluster: ClusterSpec | None, model_exists: bool) -> None:
    """Everything that can be known without workers; ValueError names the key, the file and the fix."""
    rows = load_rows(recipe.dataset)
    if isinstance(recipe, GrpoRecipe):
        for reward in recipe.rewards.functions:
            check_reward(reward.function, reward_column_names(rows.column_names))
    if cluster is not None:
        plan(used_pools(recipe), cluster)
    if model_exists and not isinstance(recipe.model, TinyModel):
        _stream(recipe, rows, _source(recipe, RunFolder(recipe.folder)))


def _run(recipe: Recipe, overwrite: bool, console: Console) -> None:
    folder = RunFolder(recipe.folder)
    folder.create(recipe, overwrite)
    if isinstance(recipe.model, TinyModel):
        make_tiny_model(recipe.model, folder.path / "initial_model", recipe.seed)
    model = _source(recipe, folder)
    tokenizer = load_tokenizer(model.path, model.revision, model.trust_remote_code)
    stream = _stream(recipe, load_rows(recipe.dataset), model)
    pools = reserve(plan(used_pools(recipe), from_ray(ray.nodes())), _RESERVE_TIMEOUT_S)
    try:
        with RunProgress(recipe.name, recipe.steps, console) as progress:
            match recipe, stream:
                case GrpoRecipe(), PromptStream():
                    asyncio.run(run_grpo(recipe, model, stream, tokenizer, pools, folder, progress))
                case SftRecipe(), ExampleStream():
                    asyncio.run(run_sft(recipe, model, stream, tokenizer, pools, folder, progress))
    finally:
        pools.release()
    console.print(f"{recipe.name}: finished; everything is in {os.path.relpath(folder.path)}", highlight=False)


def _source(recipe: Recipe, folder: RunFolder) -> ModelSource:
    match recipe.model:
        case TinyModel():
            return ModelSource(str(folder.path / "initial_model"))
        case RecipeModel():
            return ModelSource(str(RunFolder(load_recipe(recipe.model.recipe).folder).model))
        case PretrainedModel() as model:
            local = Path(model.path).expanduser()
            path = str(local.absolute()) if local.is_dir() else model.path
            return ModelSource(path, model.revision, model.trust_remote_code)


def _stream(recipe: Recipe, rows: Rows, model: ModelSource) -> PromptStream | ExampleStream:
    """The tokenized data, its first rows looked at; ValueError when the model has no room for it."""
    tokenizer = load_tokenizer(model.path, model.revision, model.trust_remote_code)
    room = max_model_length(model.path, model.revision, model.trust_remote_code)
    match recipe:
        case GrpoRecipe():
            generation = recipe.generation
            longest = generation.max_prompt_length + generation.max_completion_length
            if longest > room:
                raise ValueError(
                    f"generation: max_prompt_length {generation.max_prompt_length} + max_completion_length "
                    f"{generation.max_completion_length} = {longest} tokens, but the model has {room} positions; "
                    "lower one of them"
                )
            prompts = PromptStream(rows, tokenizer, recipe.seed, recipe.dataset.shuffle, generation.max_prompt_length)
            prompts.preflight()
            return prompts
        case SftRecipe():
            if recipe.max_length > room:
                raise ValueError(
                    f"max_length: {recipe.max_length} tokens, but the model has {room} positions; lower max_length"
                )
            examples = ExampleStream(rows, tokenizer, recipe.seed, recipe.dataset.shuffle, recipe.max_length)
            examples.preflight()
            return examples


@contextlib.contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`, else start a local Ray; a Ray started here ends here."""
    here = str(Path.cwd())
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # Replicas and reward workers start processes of their own, which must find these packages too.
        runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}}
        ray.init(include_dashboard=False, runtime_env=runtime_env, **quiet)
    elif "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        ray.init(address, **quiet)  # a submitted job has brought its working directory already
    else:
        ray.init(address, runtime_env={"working_dir": here}, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
