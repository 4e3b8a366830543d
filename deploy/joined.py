"""A cluster that was joined has room for the runs, and its nodes see their files; else that is told before they begin.

What is not there yet is not looked at: nodes that an autoscaler adds, models that another recipe has yet to leave.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actors.recipe.model import ModelConfig, PretrainedModel, RecipeModel, ReferenceConfig, TinyModel
from actors.recipe.named import named
from actors.recipe.pools import first_pools
from actors.recipe.schema import GrpoRecipe, Recipe
from actors.settings import source_of
from deploy.nodes import alive, on_nodes, probe_file, unseen
from deploy.session import ClusterError
from placement.cluster import ClusterSpec, from_ray
from placement.config import PoolConfig
from placement.plan import PlacementError, plan

_SHARED = "on storage that all nodes mount at the same place"


def check_cluster(recipes: Sequence[Recipe]) -> None:
    """ClusterError when one of them cannot be on the cluster, were it empty; RunError when a node does not answer."""
    nodes = alive()
    spec = from_ray(list(nodes.values()))
    for recipe in recipes:
        try:
            plan(first_pools(recipe), spec)
        except PlacementError as error:
            raise ClusterError(f"{recipe.name}: the cluster is too small: {error}") from None
    if len(nodes) > 1:
        for recipe in recipes:
            _check_seen(recipe, spec, nodes)


def _check_seen(recipe: Recipe, spec: ClusterSpec, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Every node that may hold a worker sees what the worker opens."""
    with ExitStack() as probes:
        try:
            probe = probes.enter_context(probe_file(recipe.folder))
        except OSError as error:
            raise ClusterError(f"run_dir: {recipe.folder} cannot be written: {error.strerror}") from None
        keys: dict[str, str] = {}
        paths: dict[str, set[str]] = {}
        pools = first_pools(recipe)
        for pool, key, path in opened(recipe, probe):
            keys[str(path)] = key
            for node in may_hold(pools, pool, spec):
                paths.setdefault(node, set()).add(str(path))
        blind = on_nodes({node: [sorted(each)] for node, each in paths.items()}, unseen, nodes)
    for name, key in keys.items():
        if where := [node for node, missing in blind.items() if name in missing]:
            raise ClusterError(_told(key, recipe.folder if Path(name) == probe else Path(name), where))


def _told(key: str, path: Path, nodes: Sequence[str]) -> str:
    where = ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more nodes" if len(nodes) > 3 else "")
    if key == "run_dir":
        return f"run_dir: what is written in {path} here is not seen on {where}; choose a folder {_SHARED}"
    return f"{key}: {path} is not there on {where}; put it {_SHARED}"


def may_hold(pools: Mapping[str, PoolConfig], pool: str, cluster: ClusterSpec) -> Iterator[str]:
    """The nodes on which Ray may put a worker of the pool: none of a pool that the recipe has no use for."""
    if pool not in pools:
        return
    home = pools[pools[pool].colocate_with or pool]  # whoever lies with others goes where they go
    one = home.model_copy(update={"num_workers": 1})
    for node in cluster.nodes:
        try:
            plan({"pool": one}, ClusterSpec((node,)))
        except PlacementError:
            continue
        yield node.name


def opened(recipe: Recipe, probe: Path) -> Iterator[tuple[str, str, Path]]:
    """Pool, key and path of what workers open on their own nodes; `probe` stands for the run folder."""
    model = _of_model("model", recipe.model, probe)
    models = [("policy", model)]
    yield "policy", "run_dir", probe
    if isinstance(recipe, GrpoRecipe):
        yield "critic", "run_dir", probe
        reference = model if recipe.reference is None else _of_model("reference", recipe.reference, probe)
        critic = model if recipe.critic_model is None else _of_model("critic.model", recipe.critic_model, probe)
        models += [("rollout", model), ("reference", reference), ("critic", critic)]
        if recipe.distillation is not None:
            models.append(("policy", reference))
        for key, path in _of_rewards(recipe):
            yield "reward", key, path
    for pool, found in models:
        if found is not None:
            yield pool, *found


def _of_model(key: str, model: ModelConfig | ReferenceConfig, probe: Path) -> tuple[str, Path] | None:
    """Where it is here; None for a name of the hub, and for what has yet to be trained."""
    match model:
        case TinyModel():
            return "run_dir", probe  # the run folder is where it is made
        case PretrainedModel() | RecipeModel():
            key = f"{key}.path" if isinstance(model, PretrainedModel) else f"{key}.recipe"
            path = Path(source_of(model).path)
            return (key, path) if path.is_absolute() and path.exists() else None


def _of_rewards(recipe: GrpoRecipe) -> Iterator[tuple[str, Path]]:
    """A relative file travels with the working directory; of a model the absolute path is told to the worker."""
    for each in named(recipe):
        path = Path(each.name).expanduser()
        path = path.absolute() if each.kind == "model" else path
        if each.key.startswith("rewards.") and path.is_absolute() and path.exists():
            yield each.key, path
