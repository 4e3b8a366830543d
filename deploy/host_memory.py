"""What a recipe's workers hold in their nodes' own memory: told by `plan`, and held against the pods of a manifest."""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence

from actors.recipe.pools import used_pools
from actors.recipe.schema import GrpoRecipe, Recipe
from deploy.manifest.groups import PodGroup
from deploy.manifest.options import ManifestOptions
from deploy.memory import BYTES, critic_load, policy_load, reference_load, version_bytes
from deploy.shapes import critic_shape, model_shape, reference_shape
from placement.config import HOST, PoolConfig, hosts_per_worker
from placement.memory.footprint import GB
from placement.memory.host import policy_host_bytes, reference_host_bytes
from placement.memory.shape import ModelShape
from placement.plan import PlacementPlan, guests_of


def host_lines(recipe: Recipe, placed: PlacementPlan) -> list[str]:
    """The node that needs most, where the model's shape is known."""
    needs = bytes_by_node(recipe, placed)
    if needs is None:
        return []
    ((node, most),) = needs.most_common(1)
    return [f"host memory: {most / GB:.0f} GB on {node}, more than on any other node, beside what processes take"]


def bytes_by_node(recipe: Recipe, placed: PlacementPlan) -> Counter[str] | None:
    """What the workers on each node hold; None where the model's shape is not known."""
    shape = _shape(recipe)
    if shape is None:
        return None
    needs: Counter[str] = Counter()
    for pool, bundles in placed.bundles.items():
        for node, count in Counter(bundle.node for bundle in bundles).items():
            needs[node] += round(host_bytes(recipe, shape, pool, count, node == bundles[0].node))
    return needs


def check_pods(recipe: Recipe, groups: Sequence[PodGroup], options: ManifestOptions) -> None:
    """ValueError when a pod would be killed for its memory while the run starts or leaves a checkpoint."""
    shape = _shape(recipe)
    if shape is None:
        return
    for group in groups:
        pools = used_pools(recipe)
        here = {group.pool} | (guests_of(pools).keys() if group.pool == HOST else set())
        workers = {pool: _in_a_pod(pools, pool, group) for pool in here}
        needs = sum(host_bytes(recipe, shape, pool, count, holds_first=True) for pool, count in workers.items()) / GB
        has = group.gpus * options.memory_per_gpu_gb or options.memory_gb
        if needs > has:
            each = -(-needs // max(1, group.gpus))
            option = "--memory-per-gpu-gb" if group.gpus else "--memory-gb"
            raise ValueError(
                f"pool {group.pool!r}: {needs:.0f} GB of host memory in each pod, which has {has}; say {option} "
                f"{1.25 * each:.0f}, which leaves a quarter for the processes"
            )


def _in_a_pod(pools: Mapping[str, PoolConfig], pool: str, group: PodGroup) -> int:
    """Most workers of the pool that a pod of the group holds; on GPUs guests lie with the first of the policy's."""
    most = -(-pools[pool].num_workers // group.num_pods)
    host = pools[group.pool]
    if pool == group.pool or not host.gpus_per_worker:
        return most
    hosts = -(-host.num_workers // group.num_pods)
    return min(pools[pool].num_workers, max(1, hosts // hosts_per_worker(pools[pool], host)))


def host_bytes(recipe: Recipe, shape: ModelShape, pool: str, workers: int, holds_first: bool) -> float:
    """Of so many workers of a pool on one node; `holds_first`: the first of them is there."""
    match pool:
        case "policy":
            return policy_host_bytes(shape, policy_load(recipe, shape), workers, holds_first)
        case "critic" if isinstance(recipe, GrpoRecipe):
            with contextlib.suppress(ValueError):  # a critic's model that is not here
                return policy_host_bytes(critic_shape(recipe, shape), critic_load(recipe), workers, holds_first)
        case "reference" if isinstance(recipe, GrpoRecipe):
            with contextlib.suppress(ValueError):  # a teacher that is not here
                return reference_host_bytes(reference_shape(recipe, shape), reference_load(recipe), workers)
        case "rollout" if isinstance(recipe, GrpoRecipe):
            parallel, staged, asleep = max(1, recipe.pools.rollout.gpus_per_worker), 0.0, 0.0
            if recipe.sync.staging == "host":
                staged = version_bytes(recipe, shape) * parallel
            if recipe.pools.rollout.colocate_with is not None and recipe.policy.lora is not None:
                asleep = BYTES[recipe.rollout.dtype] * shape.num_parameters  # below the adapter, of all its GPUs
            return workers * (staged + asleep)
    return 0.0


def _shape(recipe: Recipe) -> ModelShape | None:
    """Where it is known."""
    try:
        return model_shape(recipe)
    except ValueError:
        return None
