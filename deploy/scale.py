"""The scale verb: a run that trains is asked for another number of replicas, and has answered when this returns."""

import fcntl
import re
from pathlib import Path

from actors.errors import RunError
from actors.recipe.file import load_stored
from actors.recipe.schema import GrpoRecipe
from actors.run.folder import RunFolder
from actors.scaling import ScaleFiles
from placement.config import RolloutPoolConfig

POOLS = ("policy", "reference", "reward", "rollout")


def scale(run_dir: Path, wish: str, timeout_s: float) -> str:
    """What to tell the user; ValueError when the run cannot do it, RunError when it does not answer."""
    num_workers = parse_wish(wish)
    folder = RunFolder(run_dir)
    if not folder.recipe.exists():
        raise ValueError(f"{run_dir}: is not the folder of a run (there is no recipe.yaml in it)")
    pool = _elastic_pool(folder)
    if not pool.least <= num_workers <= pool.most:
        raise ValueError(
            f"rollout={num_workers}: the run's pools.rollout has min_workers={pool.least} and max_workers={pool.most}; "
            "choose a number within"
        )
    if not _is_training(folder):
        raise ValueError(
            f"{run_dir}: no process trains there now; say pools.rollout.num_workers={num_workers} when you give the "
            "run's command again"
        )
    try:
        refused = ScaleFiles(folder.path).ask(num_workers, timeout_s)
    except TimeoutError:
        raise RunError(
            f"the run in {run_dir} has not taken the request for {timeout_s:g} s, and it is taken back: it is starting "
            "or ending, or it does not see this folder as you do"
        ) from None
    if refused is not None:
        raise ValueError(f"rollout={num_workers}: {refused}")
    return f"taken: {num_workers} rollout replicas; they come as the cluster has room, `rollout/replicas` tells"


def parse_wish(text: str) -> int:
    """`rollout=4` as a number."""
    found = re.fullmatch(r"([a-z]+)=(\d+)", text)
    if found is None:
        raise ValueError(f"{text!r}: write POOL=N, such as rollout=4")
    pool, number = found[1], int(found[2])
    if pool not in POOLS:
        raise ValueError(f"{text}: there is no pool {pool!r}; write rollout={number}")
    if pool != "rollout":
        raise ValueError(
            f"{text}: only rollout replicas come and go while a run trains; stop the run, and give its command again "
            f"with pools.{pool}.num_workers={number}"
        )
    return number


def _elastic_pool(folder: RunFolder) -> RolloutPoolConfig:
    recipe = load_stored(folder.recipe)
    if not isinstance(recipe, GrpoRecipe):
        raise ValueError(f"{folder.path}: a run of kind {recipe.kind!r} has no rollout replicas")
    pool = recipe.pools.rollout
    if not pool.elastic:
        raise ValueError(
            f"{folder.path}: its replicas do not come and go; stop the run, and give its command again with "
            "pools.rollout.min_workers and max_workers"
        )
    return pool


def _is_training(folder: RunFolder) -> bool:
    """Whether some process holds the folder (RunFolder.held); where a file system cannot tell, the answer will."""
    try:
        with (folder.path / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # it is held, or the file system knows no locks
        return True
    return False
