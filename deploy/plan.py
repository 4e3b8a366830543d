"""The plan verb: what a recipe would run and where, told before anything is started."""

import logging
import re
import shlex
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.model.size import num_elements
from actors.recipe.deadlines import stall_parts_s, stall_timeout_s
from actors.recipe.file import load_recipe
from actors.recipe.model import PretrainedModel, RecipeModel, TinyModel
from actors.recipe.pools import used_pools
from actors.recipe.preference import PreferenceRecipe
from actors.recipe.schema import GrpoRecipe, Recipe, SftRecipe
from actors.run.folder import RunFolder
from actors.run.lineage import trained_before
from deploy.host_memory import host_lines
from deploy.memory import BYTES, estimate
from deploy.session import refusals
from deploy.trust import trusted_code
from placement.cluster import ClusterSpec, NodeSpec, from_ray, uniform
from placement.config import HOST
from placement.memory.fit import MemoryShortageError
from placement.plan import Bundle, PlacementError, PlacementPlan, plan
from sync.fanout import fanout_of, relative_time

_LABEL = r"[-./\w]+=[-.\w]+"


def show(
    recipe: Recipe, cluster: ClusterSpec, path: str, overrides: Sequence[str], gpu_memory_gb: float | None = None
) -> None:
    """Print the plan, or raise PlacementError or MemoryShortageError: nothing is printed of a plan that does not fit.

    `gpu_memory_gb` is each GPU's memory, where the cluster does not tell it.
    """
    placed = plan(used_pools(recipe), cluster)
    memory = estimate(recipe, placed, cluster, gpu_memory_gb)
    lines = [_describe(cluster, placed), f"{path}: {_summarize(recipe)}"]
    for first_path, first in reversed(trained_before(recipe, path)):
        try:
            estimate(first, plan(used_pools(first), cluster), cluster, gpu_memory_gb)
        except (PlacementError, MemoryShortageError) as error:
            raise type(error)(f"{first_path}, which is trained first: {error}") from None
        lines.insert(1, f"{first_path}, which is trained first: {_summarize(first)}")
    if isinstance(recipe, GrpoRecipe):
        lines.append(_describe_fanout(recipe, placed))
        lines.append(_describe_stall(recipe))
        lines += _describe_range(recipe)
        lines += _describe_sharing(recipe, placed)
    lines += [*memory.lines, *host_lines(recipe, placed)]
    lines += trusted_code([recipe, *(first for _, first in trained_before(recipe, path))])
    lines.append(f"submit: {_submit_line(recipe, path, overrides)}")
    console = Console()
    console.print(_table(placed))
    for table in (memory.table, memory.shared):
        if table is not None:
            console.print(table)
    for line in lines:
        # A line that is to be copied must not be wrapped at the width of the terminal.
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def planned_cluster(num_nodes: int, cpus: float, gpus: int, labels: Sequence[str]) -> ClusterSpec:
    """A cluster that is not there yet.

    Each of the `labels` is `KEY=VALUE,...` for all nodes, or `COUNT:KEY=VALUE,...` for the next COUNT of them.
    """
    each: list[dict[str, str]] = [{} for _ in range(num_nodes)]
    first = 0
    for text in labels:
        found = re.fullmatch(rf"(?:(\d+):)?({_LABEL}(?:,{_LABEL})*)", text)
        if found is None:
            raise ValueError(
                f"--node-labels {text}: write KEY=VALUE, or COUNT:KEY=VALUE for so many nodes, such as 2:tier=train"
            )
        nodes = each if found[1] is None else each[first : first + int(found[1])]
        first += int(found[1] or 0)
        for node in nodes:
            node |= dict(pair.split("=") for pair in found[2].split(","))
    if first > num_nodes:
        raise ValueError(f"--node-labels: {first} nodes are given labels, and --nodes says {num_nodes}")
    return uniform(num_nodes, cpus, gpus, each)


def live_cluster(address: str) -> ClusterSpec:
    """The nodes of the Ray cluster at the address."""
    import ray  # here, because plans for clusters that are not there must not wait for Ray's import

    with refusals(address):
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        return from_ray(ray.nodes())
    finally:
        ray.shutdown()


def _table(placed: PlacementPlan) -> Table:
    """One row for each worker, a rule between the pools; what binds a pool to its nodes, where anything does."""
    table = Table("pool", "worker", "node")
    table.add_column("CPUs", justify="right")
    table.add_column("GPUs", justify="right")
    bound = any(_binding(bundle) for bundles in placed.bundles.values() for bundle in bundles)
    if bound:
        table.add_column("only on nodes with")
    for bundles in placed.bundles.values():
        for bundle in bundles:
            row = (bundle.pool, str(bundle.worker), bundle.node, f"{bundle.cpus:g}", _gpus(bundle))
            table.add_row(*row, *([_binding(bundle)] if bound else []))
        table.add_section()
    return table


def _gpus(bundle: Bundle) -> str:
    """How many, and whose they are."""
    if not bundle.on:
        return str(bundle.gpus)
    first, last = bundle.on[0], bundle.on[-1]
    whose = f"with {HOST} {first if first == last else f'{first}-{last}'}"
    return f"{bundle.gpus}, {whose}" if bundle.gpus else whose


def _describe_sharing(recipe: GrpoRecipe, placed: PlacementPlan) -> list[str]:
    """Who lies on the policy's GPUs, and what becomes of generation."""
    guests = [pool for pool, bundles in placed.bundles.items() if bundles[0].on]
    if not guests:
        return []
    who = " and ".join(guests)
    what = "GPUs" if placed.bundles[HOST][0].gpus else "CPUs"
    line = f"shared: {who} on the {what} of the {HOST}"
    if "rollout" not in guests:
        return [line]
    line += "; while it computes no token is sampled"
    if what == "GPUs":
        kept = "weights in the host's memory" if recipe.policy.lora is not None else "no weights"
        line += f", the engines sleep ({kept}, no KV cache), and running requests are computed again afterwards"
    return [line]


def _binding(bundle: Bundle) -> str:
    labels = [f"{label}={value}" for label, value in bundle.labels.items()]
    return ", ".join([*labels, *([bundle.resource] if bundle.resource else [])])


def _describe(cluster: ClusterSpec, placed: PlacementPlan) -> str:
    """The cluster that was planned for, equal nodes together; of their labels those that matter to the plan."""
    matter = {label for bundles in placed.bundles.values() for bundle in bundles for label in bundle.labels}
    kinds = Counter(_describe_node(node, matter) for node in cluster.nodes)
    return f"cluster: {', '.join(f'{count} x ({kind})' for kind, count in kinds.items())}"


def _describe_node(node: NodeSpec, matter: Collection[str]) -> str:
    labels = [f"{label}={value}" for label, value in sorted(node.labels.items()) if label in matter]
    return ", ".join([f"{node.cpus:g} CPUs", f"{node.gpus} GPUs", *labels])


def _summarize(recipe: Recipe) -> str:
    """What the recipe will do, in figures."""
    match recipe:
        case SftRecipe():
            return f"sft, {recipe.steps} steps of {recipe.batch_size} sequences; leaves {recipe.folder}"
        case PreferenceRecipe():
            unit = "judged sequences" if recipe.kind == "kto" else "pairs"
            return f"{recipe.kind}, {recipe.steps} steps of {recipe.batch_size} {unit}; leaves {recipe.folder}"
        case GrpoRecipe():
            groups, bound = recipe.groups_per_batch, recipe.staleness.max_staleness
            group_size = recipe.algorithm.num_generations
            return (
                f"grpo, {recipe.steps} steps of {groups * group_size} rollouts ({groups} groups x {group_size}); "
                f"staleness at most {bound} version{'' if bound == 1 else 's'} ({recipe.staleness.when_stale}), "
                f"{recipe.max_groups_in_flight} groups in flight at most; leaves {recipe.folder}"
            )


def _describe_stall(recipe: GrpoRecipe) -> str:
    parts = " + ".join(f"{seconds:g} {part}" for part, seconds in stall_parts_s(recipe).items())
    given = "" if recipe.stall.timeout_s is not None else f": {parts}"
    return (
        f"stall: when no group has finished for {stall_timeout_s(recipe):.0f} s while the policy waits "
        f"(stall.timeout_s{given}), the run {'ends with' if recipe.stall.then == 'exit' else 'replaces'} its suspect"
    )


def _describe_range(recipe: GrpoRecipe) -> list[str]:
    pool = recipe.pools.rollout
    if not pool.elastic:
        return []
    return [
        f"rollout: {pool.least} to {pool.most} replicas; the run begins when {pool.least} have a place, and asks for "
        f"{pool.num_workers} (python -m deploy scale {recipe.folder} rollout=N asks for another number)"
    ]


def _describe_fanout(recipe: GrpoRecipe, placed: PlacementPlan) -> str:
    """How a weight version reaches the rollout workers, and how long that takes; the link's own speed is not known."""
    workers = [bundle.node for bundle in placed.bundles["rollout"] for _ in range(max(1, bundle.gpus))]
    machines = [placed.bundles["policy"][0].node, *workers]
    num_bytes = _num_bytes(recipe)
    fanout = fanout_of(recipe.sync, machines, num_bytes)
    road = "one broadcast group" if fanout is None else f"a relay tree of fan-out {fanout}" if fanout > 1 else "a chain"
    line = f"weights: {recipe.sync.transport}, to {len(workers)} rollout worker{'s' * (len(workers) > 1)} by {road}"
    if len(set(machines)) == 1:
        return f"{line}, all on one machine"
    if recipe.sync.transport == "nccl":
        return line
    bucket_bytes = recipe.sync.bucket_mb * 2**20
    size = round(bucket_bytes) if num_bytes is None else num_bytes
    ours, group = (relative_time(machines, size, bucket_bytes, each) for each in (fanout, None))
    line += f"; predicted {ours:.3g} times what a link takes for one copy"
    if fanout is not None:
        line += f" (one group: {group:.3g} times)"
    unknown = "an adapter" if recipe.policy.lora is not None else "the model is not here yet and"
    return f"{line}; {unknown} counts as one bucket" if num_bytes is None else line


def _num_bytes(recipe: GrpoRecipe) -> int | None:
    """A version's size as it travels, where the model's files are here to tell; of an adapter they do not."""
    if recipe.policy.lora is not None:
        return None
    match recipe.model:
        case PretrainedModel(path=path):
            elements = num_elements(Path(path))
        case RecipeModel(recipe=first):
            elements = num_elements(RunFolder(load_recipe(first).folder).model)
        case TinyModel():
            elements = None
    return elements and elements * BYTES[recipe.rollout.dtype]


def _submit_line(recipe: Recipe, path: str, overrides: Sequence[str]) -> str:
    """The command that runs this on a cluster, where a relative run folder would be lost."""
    folder = [] if recipe.folder.is_absolute() else [f"run_dir=/SHARED/{recipe.folder}"]
    return shlex.join(["python", "-m", "deploy", "submit", path, *overrides, *folder, "--address", "http://HEAD:8265"])
