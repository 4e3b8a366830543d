"""The plan verb: what a recipe would run and where, told before anything is started."""

import logging
import shlex
import socket
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe, Recipe, SftRecipe
from actors.run.lineage import trained_before
from placement.cluster import ClusterSpec, from_ray
from placement.plan import PlacementError, PlacementPlan, plan

_KNOCK_TIMEOUT_S = 10.0


def show(recipe: Recipe, cluster: ClusterSpec, path: str, overrides: Sequence[str]) -> None:
    """Print the plan, or raise PlacementError: nothing is printed of a plan that does not fit."""
    placed = plan(used_pools(recipe), cluster)
    lines = [_describe(cluster), f"{path}: {_summarize(recipe)}"]
    for first_path, first in reversed(trained_before(recipe, path)):
        try:
            plan(used_pools(first), cluster)
        except PlacementError as error:
            raise PlacementError(f"{first_path}, which is trained first: {error}") from None
        lines.insert(1, f"{first_path}, which is trained first: {_summarize(first)}")
    lines.append(f"submit: {_submit_line(path, overrides)}")
    console = Console()
    console.print(_table(placed))
    for line in lines:
        # A line that is to be copied must not be wrapped at the width of the terminal.
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def live_cluster(address: str) -> ClusterSpec:
    """The nodes of the Ray cluster at the address."""
    import ray  # here, because plans for clusters that are not there must not wait for Ray's import

    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--address {address}: {reason}; start Ray there, or leave --address out") from None
    try:
        return from_ray(ray.nodes())
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """OSError at once where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_TIMEOUT_S).close()


def _table(placed: PlacementPlan) -> Table:
    """One row for each worker, a rule between the pools."""
    table = Table("pool", "worker", "node")
    table.add_column("CPUs", justify="right")
    table.add_column("GPUs", justify="right")
    for bundles in placed.bundles.values():
        for bundle in bundles:
            table.add_row(bundle.pool, str(bundle.worker), bundle.node, f"{bundle.cpus:g}", str(bundle.gpus))
        table.add_section()
    return table


def _describe(cluster: ClusterSpec) -> str:
    """The cluster that was planned for, equal nodes together."""
    sizes = Counter((node.cpus, node.gpus) for node in cluster.nodes)
    nodes = [f"{count} x ({cpus:g} CPUs, {gpus} GPUs)" for (cpus, gpus), count in sizes.items()]
    return f"cluster: {', '.join(nodes)}"


def _summarize(recipe: Recipe) -> str:
    """What the recipe will do, in figures."""
    match recipe:
        case SftRecipe():
            return f"sft, {recipe.steps} steps of {recipe.batch_size} sequences; leaves {recipe.folder}"
        case GrpoRecipe():
            groups, bound = recipe.groups_per_batch, recipe.staleness.max_staleness
            group_size = recipe.algorithm.num_generations
            return (
                f"grpo, {recipe.steps} steps of {groups * group_size} rollouts ({groups} groups x {group_size}); "
                f"staleness at most {bound} version{'' if bound == 1 else 's'} ({recipe.staleness.when_stale}), "
                f"{recipe.max_groups_in_flight} groups in flight at most; leaves {recipe.folder}"
            )


def _submit_line(path: str, overrides: Sequence[str]) -> str:
    """The command that runs this on a cluster; Ray gives the job its address."""
    return shlex.join(
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "deploy", "train", path, *overrides]
    )
