"""Whether a run folder can be gone on with by this recipe, and from where."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from actors.checkpoint.cut import Cut
from actors.checkpoint.groups import SavedGroup
from actors.checkpoint.store import CheckpointStore, DamagedError
from actors.recipe.file import load_stored
from actors.recipe.schema import Recipe

_FREE = (
    "pools", "rollout", "sync", "logging", "checkpoint", "liveness", "stall", "health", "simulation", "run_dir",
    "policy.zero_stage", "policy.num_threads", "policy.timeout_s", "policy.max_restarts",
    "policy.gradient_checkpointing", "policy.sequence_parallel_size", "policy.offload", "policy.liger",
    "critic.zero_stage", "critic.sequence_parallel_size", "rewards.timeout_s", "rewards.max_failed_share",
    "rewards.max_concurrent_groups", "rewards.max_memory_gb",
    "dataset.max_bad_rows", "generation.timeout_s",
)  # fmt: skip
"""How and where a run computes may change when it goes on; what it computes may not, but by name."""
_BOUND = ("rollout.dtype",)
"""The exception among them."""
_OF_ROWS = ("dataset", *(f"dataset.{key}" for key in ("path", "name", "split", "revision", "task", "size")))
"""Of these one says that the rows may be others."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on from this cut."""

    path: Path
    cut: Cut
    groups: list[SavedGroup]
    notes: tuple[str, ...] = ()
    """What the user should know: checkpoints that were passed over, and changes of the recipe."""


def find(store: CheckpointStore, recipe_file: Path, recipe: Recipe, allowed: Collection[str]) -> Resume | None:
    """The newest cut that is whole; None when the run has made none.

    ValueError when the recipe has changed in a key that is not `allowed`, when every checkpoint is damaged, or when one
    is of another format.
    """
    versions = store.versions()
    if not versions:
        return None
    notes = []
    for key, old, new in changes(recipe_file, recipe):
        free = _is_among(key, _FREE) and key not in _BOUND
        if not free and not _is_among(key, allowed):
            raise ValueError(
                f"{recipe_file}: {key} was {old!r} when the run began and is {new!r} now; go on with "
                f"--allow-change {key}, take the old value, or begin anew with --overwrite"
            )
        notes.append(f"{key} was {old!r} and is {new!r} from here on")
    for version in reversed(versions):
        try:
            path = store.open(version)
            cut, groups = Cut.read(path)
            check_tensors(path)
            if cut.version != version:
                raise DamagedError(f"{path / 'cut.json'}: is of version {cut.version}")
        except DamagedError as error:
            notes.append(f"a checkpoint is passed over: {error}")
            continue
        return Resume(path, cut, groups, tuple(notes))
    raise ValueError(f"{store.path}: no checkpoint is whole ({notes[-1]}); begin anew with --overwrite")


def with_rows(resume: Resume, num_rows: int, source: str, allowed: Collection[str]) -> Resume:
    """With a note, ValueError when it is not `allowed`, where the data set has another number of rows than it had.

    Whoever goes on then trains some rows twice and others never, though the journal is in order. That the rows are the
    same ones is not looked at.
    """
    had = resume.cut.num_rows
    if had in (None, num_rows):
        return resume
    if not any(key in allowed for key in _OF_ROWS):
        raise ValueError(
            f"dataset.path: {source} has {num_rows} rows and had {had} when the checkpoint was made, so the order "
            "would be another one, some rows trained twice and others never; put the data back, go on all the same "
            "with --allow-change dataset.path, or begin anew with --overwrite"
        )
    note = f"the data set had {had} rows and has {num_rows} from here on: some are trained twice, others never"
    return replace(resume, notes=(*resume.notes, note))


def check_tensors(folder: Path) -> None:
    """DamagedError names a file of tensors that cannot be one; no tensor is read."""
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path}: {error}") from error


def changes(recipe_file: Path, recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ from those of the recipe in a run folder, with the old and the new value."""
    return _differences(load_stored(recipe_file).model_dump(mode="json"), recipe.model_dump(mode="json"))


def _is_among(key: str, keys: Collection[str]) -> bool:
    """The key, or one that it is inside of."""
    return any(key == other or key.startswith(other + ".") for other in keys)


def _differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`{"a": {"b": 1}}` and `{"a": {"b": 2}}` -> `("a.b", 1, 2)`; where one is empty, all: `("a", {}, {"b": 2})`.

    What is null, or missing, on one side is so key by key.
    """
    old, new = ({} if side is None else side for side in (before, now))
    if isinstance(old, Mapping) and isinstance(new, Mapping) and {} not in (before, now):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
