"""What a cluster could not run is told before anything is sent: the errors of `train`, and paths that stay behind."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from actors.recipe.named import named
from actors.recipe.pools import first_pools
from actors.recipe.schema import Recipe
from actors.run.lineage import trained_before
from deploy.jobs.shipment import Shipment
from placement.cluster import ClusterSpec
from placement.memory.fit import MemoryShortageError
from placement.plan import PlacementError, plan

Runs = Sequence[tuple[str, Recipe]]
"""Recipes with the files that they were read from, in the order in which they run."""


def all_runs(recipe: Recipe, path: str) -> Runs:
    """The recipe, after those that have to be trained before it."""
    return [*trained_before(recipe, path), (path, recipe)]


def recipe_name(path: str, root: Path) -> str:
    """The recipe's path as the cluster will see it: from the folder that is sent."""
    inside = os.path.relpath(path, root)
    if inside.startswith(".."):
        raise ValueError(f"{path}: lies outside of {root}, which is what is sent; copy it there")
    return inside


def check_run_dirs(runs: Runs) -> None:
    """ValueError when a run would be lost with the copy of this folder in which the cluster runs the job."""
    for path, recipe in runs:
        if not recipe.folder.is_absolute():
            where = "" if recipe is runs[-1][1] else " in that file"
            raise ValueError(
                f"{path}: run_dir: {recipe.folder} lies in the copy of this folder that Ray makes for the job, and "
                f"deletes after it: the run would be lost. Name a folder on storage that all nodes see{where}, such as "
                f"run_dir=/shared/runs/{recipe.name}"
            )


def check_sent(runs: Runs, shipment: Shipment) -> None:
    """ValueError when a recipe names something of this folder that is not sent."""
    for path, recipe in runs:
        for key, name in [("the recipe", path), *((each.key, each.name) for each in named(recipe))]:
            if Path(name).is_absolute() or not (shipment.root / name).exists() or shipment.has(name):
                continue
            raise ValueError(
                f"{path}: {key}: {name} is here and would not be sent: a link to a folder, a run, or something that "
                ".gitignore or .rayignore leave out. Put it on storage that all nodes see and name it by its absolute "
                "path, or let it be sent"
            )


def elsewhere(runs: Runs) -> list[str]:
    """Keys with absolute paths that are not on this machine: only the cluster can check what is there."""
    paths = ((each.key, Path(each.name)) for _, recipe in runs for each in named(recipe))
    return [f"{key}: {path}" for key, path in paths if path.is_absolute() and not path.exists()]


def check_as_train(recipe: Recipe, path: str, overwrite: bool, allowed: Collection[str]) -> None:
    """The ValueErrors of `train`, but for the key of Weights & Biases, which is the cluster's."""
    from deploy.train import prepare  # loads torch

    os.environ["WANDB_MODE"] = "offline"  # here, where nothing is tracked
    prepare(recipe, path, "a cluster", overwrite, allowed)


def check_room(runs: Runs, cluster: ClusterSpec) -> None:
    """ValueError when the cluster, were it empty, is too small for a run."""
    from deploy.memory import estimate

    for path, recipe in runs:
        try:
            estimate(recipe, plan(first_pools(recipe), cluster), cluster, None)
        except (PlacementError, MemoryShortageError) as error:
            raise ValueError(f"{path}: the cluster is too small: {error}") from None
