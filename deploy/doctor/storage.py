"""The run folder takes what a run writes: it is writable, its checkpoints fit, and every node sees the same files."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from actors.checkpoint.config import CheckpointConfig
from actors.checkpoint.store import CheckpointStore
from actors.model.tiny import tiny_skeleton
from actors.recipe.file import load_recipe
from actors.recipe.model import RecipeModel, TinyModel
from actors.recipe.schema import Recipe
from actors.run.folder import RunFolder
from deploy.doctor.check import Finding, failed, passed, skipped, warned
from deploy.memory import policy_load
from deploy.nodes import nearest
from deploy.shapes import model_shape
from placement.memory.footprint import GB

BYTES_PER_TRAINED = 12
"""Of a checkpoint: float32 weights, and AdamW's two moments."""
BYTES_PER_WEIGHT = 4
"""Of the model that a run leaves."""


def check_writable(folder: Path) -> Finding:
    """What a run does in its folder is done beside it: a file is written, synced, locked, renamed and removed."""
    place = nearest(folder)
    fix = "choose another with run_dir=..., or give it to the user that trains"
    if not place.is_dir():
        return failed(f"{place} is a file", fix)
    probe = place / f".doctor-{uuid.uuid4().hex}"
    renamed = probe.with_suffix(".renamed")
    try:
        with probe.open("wb") as file:
            file.write(b"paceline")
            file.flush()
            os.fsync(file.fileno())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        probe.rename(renamed)
    except OSError as error:
        why = "it takes no locks, which keep two runs out of one folder" if error.errno == errno.ENOLCK else str(error)
        return failed(f"{place}: {why}", fix)
    finally:
        probe.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)
    return _what_is_there(folder)


def _what_is_there(folder: Path) -> Finding:
    run = RunFolder(folder)
    if run.finished:
        return warned(
            f"{folder} is writable, and holds a finished run, over which `train` does not write",
            "choose another with run_dir=..., or replace it with --overwrite",
        )
    try:
        run.check_free(overwrite=True)
    except ValueError as error:
        return Finding("fail", str(error))
    if not run.recipe.exists():
        return passed(f"{folder} is writable")
    newest = max(CheckpointStore(run.checkpoints).versions(), default=None)
    begins = "begins it anew" if newest is None else f"goes on from its step {newest}"
    return passed(f"{folder} is writable, and holds a run: `train` {begins}")


def check_disk(free: float, needed: float | None, keep: int, folder: Path) -> Finding:
    """`free` and `needed` in bytes, the latter None where it is not known."""
    if needed is None:
        return skipped(f"{folder}: {free / GB:.1f} GB free; what checkpoints take is not known: the model is not here")
    has = f"{folder}: {free / GB:.1f} GB free, and {keep + 1} checkpoints and the model take {needed / GB:.2g}"
    if free < needed:
        lower = "lower checkpoint.keep, " if keep > 2 else ""  # two are kept at least
        return failed(has, f"make room, {lower}or choose another run_dir")
    if free < 1.5 * needed:
        return warned(has, "leave room for samples and logs beside them")
    return passed(has)


def free_bytes(folder: Path) -> float:
    """What a run may write: what is free, and what checkpoints hold that it will replace."""
    checkpoints = RunFolder(folder).checkpoints
    held = sum(path.stat().st_size for path in checkpoints.rglob("*") if path.is_file()) if checkpoints.is_dir() else 0
    return float(shutil.disk_usage(nearest(folder)).free + held)


def bytes_needed(recipe: Recipe) -> float | None:
    """What a run of the recipe lays down at most; None where its model's size is not known here."""
    sizes = num_parameters(recipe)
    return None if sizes is None else bytes_of(*sizes, recipe.checkpoint)


def bytes_of(parameters: int, trained: int, checkpoint: CheckpointConfig) -> float:
    """`keep` checkpoints, the best, the one that is being written, and the model."""
    num = checkpoint.keep + 1 + (checkpoint.best is not None)
    return float(num * trained * BYTES_PER_TRAINED + parameters * BYTES_PER_WEIGHT)


def num_parameters(recipe: Recipe) -> tuple[int, int] | None:
    """Of the model, and of those that are trained."""
    match recipe.model:
        case TinyModel() as tiny:
            total = sum(parameter.numel() for parameter in tiny_skeleton(tiny).parameters())
            return total, total
        case RecipeModel(recipe=path) if not RunFolder(load_recipe(path).folder).finished:
            return num_parameters(load_recipe(path))
    try:
        shape = model_shape(recipe)
    except ValueError:
        return None
    if shape is None:
        return None
    trained = policy_load(recipe, shape).num_trained
    return shape.num_parameters, shape.num_parameters if trained is None else trained


def check_shared(folder: Path, seen: Mapping[str, bool]) -> Finding:
    """`seen`: by node, whether it sees a file that this machine has laid down where the run folder is to be."""
    blind = sorted(node for node, sees in seen.items() if not sees)
    if blind:
        return failed(
            f"{folder} here is not what {', '.join(blind[:3])} see{'s' * (len(blind) == 1)} under that name",
            "choose a run_dir on storage that all nodes mount at the same place",
        )
    return passed(f"all {len(seen)} nodes see what is written at {folder}")
