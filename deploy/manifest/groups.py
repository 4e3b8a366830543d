"""A pool is one group of equal pods, and the planner proves that the pods together hold every pool.

A worker never spans pods. Which pods a pool gets is bound by a custom Ray resource that its group alone offers; labels
that the recipe asks for are given to the pods of its group. A pool that shares the policy's GPUs lies in the policy's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actors.recipe.pools import used_pools
from actors.recipe.schema import Recipe
from deploy.manifest.options import ManifestOptions
from placement.cluster import ClusterSpec, NodeSpec
from placement.config import HOST, PoolConfig
from placement.plan import in_one_place, plan


@dataclass(frozen=True, slots=True)
class PodGroup:
    """Equal pods of one pool."""

    pool: str
    num_pods: int
    cpus: int
    gpus: int
    resource: str
    """The custom Ray resource that binds the pool to these pods."""
    least: int
    most: int
    labels: Mapping[str, str]
    """What the pool asks of its nodes."""

    @property
    def given_labels(self) -> dict[str, str]:
        """Those that the pods are given; Ray and KubeRay themselves find out their own, from the machine."""
        return {label: value for label, value in self.labels.items() if not label.startswith(_RAYS_OWN)}


_RAYS_OWN = "ray.io/"


def pod_groups(recipes: Sequence[Recipe], options: ManifestOptions) -> tuple[PodGroup, ...]:
    """One group for each pool of the last recipe, large enough for those that are trained before it, too.

    ValueError when a worker is larger than a node, or the recipes do not fit on what is rendered.
    """
    last = used_pools(recipes[-1])
    merged = {}
    for pool, config in last.items():
        if config.colocate_with is None:
            sizes = [_size(pool, used_pools(recipe), options) for recipe in recipes if pool in used_pools(recipe)]
            merged[pool] = _group(pool, config, sizes, options)
    groups = tuple(merged.values())
    cluster = _cluster(groups)
    for recipe in recipes[:-1]:
        plan(used_pools(recipe), cluster)
    plan(bound_pools(recipes[-1], groups), cluster)
    return groups


def bound_pools(recipe: Recipe, groups: Sequence[PodGroup]) -> dict[str, PoolConfig]:
    """The pools as the run will see them, each bound to its group."""
    resources = {group.pool: group.resource for group in groups}
    return {
        pool: config.model_copy(update={"node_resource": resources.get(pool)})
        for pool, config in used_pools(recipe).items()
    }


def bindings(recipe: Recipe, groups: Sequence[PodGroup]) -> list[str]:
    """What the recipe must be told for that: overrides for the pools that it binds to nothing itself."""
    pools = used_pools(recipe)
    return [f"pools.{g.pool}.node_resource={g.resource}" for g in groups if pools[g.pool].node_resource is None]


@dataclass(frozen=True, slots=True)
class _Size:
    num_pods: int
    cpus: int
    gpus: int


def _size(pool: str, pools: Mapping[str, PoolConfig], options: ManifestOptions) -> _Size:
    """As few pods as the workers need, as equally filled as can be; those who share GPUs are together in one."""
    config = pools[pool]
    together, guests_cpus = in_one_place(pools) if pool == HOST else (1, 0.0)
    each_gpus, each_cpus = together * config.gpus_per_worker, together * config.cpus_per_worker + guests_cpus
    whose = "" if not guests_cpus else " with those who share its GPUs"
    if each_gpus > options.gpus_per_node:
        raise ValueError(
            f"pools.{pool}.gpus_per_worker: {each_gpus}{whose}, but a node has {options.gpus_per_node} GPUs; lower it, "
            f"or say --gpus-per-node {each_gpus}"
        )
    if each_cpus > options.cpus_per_node:
        raise ValueError(
            f"pools.{pool}.cpus_per_worker: {each_cpus:g}{whose}, but a node has {options.cpus_per_node:g} CPUs; lower "
            f"it, or say --cpus-per-node {each_cpus:g}"
        )
    room = max(1, int(options.cpus_per_node / each_cpus + 1e-9))
    if each_gpus:
        room = min(room, options.gpus_per_node // each_gpus)
    if config.strategy == "spread" or (pool == "rollout" and options.elastic is not None):
        room = 1
    count = config.num_workers // together
    num_pods = math.ceil(count / room)
    workers = math.ceil(count / num_pods)
    return _Size(num_pods, math.ceil(workers * each_cpus - 1e-9), workers * each_gpus)


def _group(pool: str, config: PoolConfig, sizes: Sequence[_Size], options: ManifestOptions) -> PodGroup:
    num_pods = max(size.num_pods for size in sizes)
    least = most = num_pods
    if pool == "rollout" and options.elastic is not None:
        least, most = options.elastic.least, options.elastic.most
        if not least <= num_pods <= most:
            raise ValueError(
                f"--elastic-rollout {least}..{most}: the run begins with pools.rollout.num_workers={num_pods} "
                f"replicas; widen the range, or set pools.rollout.num_workers={min(max(num_pods, least), most)}"
            )
    return PodGroup(
        pool=pool,
        num_pods=num_pods,
        cpus=max(size.cpus for size in sizes),
        gpus=max(size.gpus for size in sizes),
        resource=config.node_resource or f"paceline-{pool}",
        least=least,
        most=most,
        labels=config.node_labels,
    )


def _cluster(groups: Sequence[PodGroup]) -> ClusterSpec:
    """The nodes that Ray will see; its head offers nothing."""
    return ClusterSpec(
        tuple(
            NodeSpec(f"{group.pool}-{index}", float(group.cpus), group.gpus, _offered(group), group.labels)
            for group in groups
            for index in range(group.num_pods)
        )
    )


def _offered(group: PodGroup) -> Mapping[str, float]:
    return {group.resource: 1.0}
