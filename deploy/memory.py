"""What `plan` says about memory: a column for each pool with GPUs, a refusal where one cannot fit, or why neither.

A GB is 2**30 bytes here; GPUs are sold by a little more than they have.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from actors.model.heads import uneven_heads
from actors.recipe.base import OfflineRecipe
from actors.recipe.critic import CriticConfig
from actors.recipe.preference import PreferenceRecipe
from actors.recipe.schema import GrpoRecipe, Recipe
from deploy.shapes import critic_shape, model_shape, reference_shape
from placement.cluster import ClusterSpec
from placement.memory.accelerators import gpu_memory_gb
from placement.memory.fit import check_policy, check_reference, check_rollout, sequences, total
from placement.memory.footprint import (
    GB,
    Footprint,
    PolicyLoad,
    ReferenceLoad,
    RolloutLoad,
    policy_footprint,
    reference_footprint,
    rollout_footprint,
)
from placement.memory.shape import ModelShape
from placement.memory.shared import SharedLoad, check_shared, moments
from placement.plan import PlacementPlan

BYTES = {"float32": 4, "bfloat16": 2}
_PARTS = ("weights", "gradients", "optimizer", "activations", "output head", "KV cache", "buffers")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan shows of memory: lines, and a table where the model's shape is known."""

    lines: list[str]
    table: Table | None = None
    shared: Table | None = None
    """Of a GPU that pools share."""


def estimate(recipe: Recipe, placed: PlacementPlan, cluster: ClusterSpec, gpu_gb: float | None) -> Estimate:
    """MemoryShortageError when a pool cannot fit on the GPUs that its plan gives it.

    `gpu_gb` is each GPU's memory; with None the nodes tell it, where they can.
    """
    pools = [pool for pool, bundles in placed.bundles.items() if any(bundle.gpus for bundle in bundles)]
    pools = [pool for pool in pools if pool != "reward"]  # a reward function's memory is its own
    if not pools:
        return Estimate([])
    try:
        shape = model_shape(recipe)
    except ValueError as error:
        return Estimate([f"memory: not estimated: {error}"])
    if shape is None:
        return Estimate([])
    shapes, lines = _shapes(recipe, shape, pools)
    _check_heads(recipe, shapes)
    memory = {pool: gpu_gb or _told(pool, placed, cluster) for pool in shapes}
    for pool, its in shapes.items():
        if (gigabytes := memory[pool]) is not None:
            _check(recipe, its, pool, gigabytes * GB)
    footprints = {pool: _footprint(recipe, shapes[pool], pool, has and has * GB) for pool, has in memory.items()}
    lines += _unknown_teacher(recipe, shape)
    lines.insert(0, f"memory: estimated for {shape.num_parameters / 1e9:.3g} B parameters{_unknown(memory)}")
    shared = _shared(recipe, shape, placed, footprints, memory.get("policy"))
    return Estimate(lines + _waiting(recipe, shape, memory.get("rollout")), _table(footprints, memory), shared)


def _shared(
    recipe: Recipe, shape: ModelShape, placed: PlacementPlan, footprints: Mapping[str, Footprint], has: float | None
) -> Table | None:
    """What is together on a GPU of the policy; MemoryShortageError when that cannot be."""
    guests = [pool for pool, bundles in placed.bundles.items() if bundles[0].on and pool in footprints]
    if not guests or not isinstance(recipe, GrpoRecipe):
        return None
    rollout = rollout_load(recipe, shape) if "rollout" in guests else None
    others = {pool: total(footprints[pool]) for pool in guests if pool != "rollout"}
    load = SharedLoad(shape, policy_load(recipe, shape), rollout, others)
    if has is not None:
        check_shared(load, has * GB, _longest(recipe))
    table = Table("GB on a shared GPU")
    found = moments(load, has and has * GB)
    for moment in found:
        table.add_column(f"while {moment}", justify="right")
    for pool in ("policy", *guests):
        table.add_row(pool, *(f"{pools[pool] / GB:.1f}" for pools in found.values()))
    table.add_section()
    table.add_row("together", *(f"{sum(pools.values()) / GB:.1f}" for pools in found.values()))
    return table


def _shapes(recipe: Recipe, shape: ModelShape, pools: Iterable[str]) -> tuple[dict[str, ModelShape], list[str]]:
    """The model of each pool, and a line for one that is not known."""
    shapes = dict.fromkeys(pools, shape)
    lines = []
    for pool, shape_of in (("reference", reference_shape), ("critic", critic_shape)):
        if pool not in shapes or not isinstance(recipe, GrpoRecipe):
            continue
        try:
            shapes[pool] = shape_of(recipe, shape)
        except ValueError as error:
            del shapes[pool]
            lines.append(f"memory: the {pool} is not estimated: {error}")
    return shapes, lines


def _unknown_teacher(recipe: Recipe, shape: ModelShape) -> list[str]:
    """What the policy's column lacks."""
    try:
        _teacher_bytes(recipe, shape)
    except ValueError as error:
        return [f"memory: the teacher, which each policy rank holds, is not estimated: {error}"]
    return []


def _teacher_bytes(recipe: Recipe, shape: ModelShape) -> float:
    """Of the teacher on each policy rank; ValueError when its shape is not known."""
    if not isinstance(recipe, GrpoRecipe) or recipe.distillation is None:
        return 0.0
    return float(BYTES[recipe.policy.dtype] * reference_shape(recipe, shape).num_parameters)


def _table(footprints: Mapping[str, Footprint], memory: Mapping[str, float | None]) -> Table:
    """A column for each pool, a row for each part."""
    table = Table("GB on each GPU")
    for pool in footprints:
        table.add_column(pool, justify="right")
    for part in _PARTS:
        sizes = [footprint.get(part) for footprint in footprints.values()]
        if any(sizes):
            table.add_row(part, *("" if size is None else f"{size / GB:.1f}" for size in sizes))
    table.add_section()
    table.add_row("together", *(f"{total(footprint) / GB:.1f}" for footprint in footprints.values()))
    table.add_row("the GPU has", *("?" if (has := memory[pool]) is None else f"{has:g}" for pool in footprints))
    return table


def _told(pool: str, placed: PlacementPlan, cluster: ClusterSpec) -> float | None:
    """The smallest GPU of the pool's nodes."""
    nodes = {node.name: node for node in cluster.nodes}
    sizes = [gpu_memory_gb(nodes[bundle.node]) for bundle in placed.bundles[pool]]
    known = [size for size in sizes if size is not None]
    return min(known) if len(known) == len(sizes) else None


def _unknown(memory: Mapping[str, float | None]) -> str:
    if None not in memory.values():
        return ""
    return "; say --gpu-memory-gb to have it held against the GPUs"


def _check(recipe: Recipe, shape: ModelShape, pool: str, gpu_bytes: float) -> None:
    match pool:
        case "policy":
            check_policy(shape, policy_load(recipe, shape), gpu_bytes, _longest(recipe))
        case "critic" if isinstance(recipe, GrpoRecipe):
            check_policy(shape, critic_load(recipe), gpu_bytes, _longest(recipe), "critic")
        case "reference" if isinstance(recipe, GrpoRecipe):
            check_reference(shape, reference_load(recipe), gpu_bytes, _longest(recipe))
        case "rollout" if isinstance(recipe, GrpoRecipe):
            check_rollout(shape, rollout_load(recipe, shape), gpu_bytes)


def _check_heads(recipe: Recipe, shapes: Mapping[str, ModelShape]) -> None:
    """ValueError when the policy's ranks, or the critic's, cannot share out the heads of their model."""
    sizes = {"policy": recipe.policy.sequence_parallel_size}
    if isinstance(recipe, GrpoRecipe) and recipe.critic is not None:
        sizes["critic"] = recipe.critic.sequence_parallel_size
    for pool, size in sizes.items():
        its = shapes.get(pool)
        if its is not None and (problem := uneven_heads(its.num_heads, its.num_kv_heads, size)) is not None:
            raise ValueError(f"{pool}.sequence_parallel_size: {problem}")


def _footprint(recipe: Recipe, shape: ModelShape, pool: str, gpu_bytes: float | None) -> Footprint:
    match pool:
        case "critic" if isinstance(recipe, GrpoRecipe):
            return policy_footprint(shape, critic_load(recipe))
        case "reference" if isinstance(recipe, GrpoRecipe):
            return reference_footprint(shape, reference_load(recipe))
        case "rollout" if isinstance(recipe, GrpoRecipe):
            return rollout_footprint(shape, rollout_load(recipe, shape), gpu_bytes)
    return policy_footprint(shape, policy_load(recipe, shape))


def _waiting(recipe: Recipe, shape: ModelShape, gpu_gb: float | None) -> list[str]:
    """Whether a replica's cache holds as many sequences as it may decode at once."""
    if gpu_gb is None or not isinstance(recipe, GrpoRecipe):
        return []
    fit, most = sequences(shape, rollout_load(recipe, shape), gpu_gb * GB), recipe.rollout.max_num_seqs
    line = f"KV cache of a replica: {fit} sequences of the longest kind, and rollout.max_num_seqs is {most}"
    return [line if fit >= most else f"{line}; beyond them vLLM lets sequences wait and computes their cache again"]


# What the recipe says, in the words of the estimate ------------------------------------------------------------------


def policy_load(recipe: Recipe, shape: ModelShape) -> PolicyLoad:
    """Of one rank of the recipe's policy."""
    policy, lora = recipe.policy, recipe.policy.lora
    teacher = 0.0
    with contextlib.suppress(ValueError):  # one that is not here, of which a line tells
        teacher = _teacher_bytes(recipe, shape)
    return PolicyLoad(
        num_ranks=recipe.pools.policy.num_workers,
        zero_stage=policy.zero_stage,
        bytes_per_weight=BYTES[policy.dtype],
        tokens=_tokens(recipe, _per_team(recipe)),
        gradient_checkpointing=policy.gradient_checkpointing,
        sequence_parallel=policy.sequence_parallel_size,
        num_trained=_adapted(recipe, shape),
        four_bits=lora is not None and lora.quantize is not None,
        offload=policy.offload is not None,
        offload_weights=policy.offload is not None and policy.offload.parameters is not None,
        teacher=teacher,
    )


def critic_load(recipe: GrpoRecipe) -> PolicyLoad:
    """Of one rank of the recipe's critic, which trains a whole model with a head for one number."""
    assert recipe.pools.critic is not None
    num_ranks = recipe.pools.critic.num_workers
    like = (recipe.critic or CriticConfig()).ranks_like(recipe.policy)
    num_teams = num_ranks // like.sequence_parallel_size
    num_sequences = -(-recipe.groups_per_batch * recipe.algorithm.num_generations // num_teams)
    return PolicyLoad(
        num_ranks=num_ranks,
        zero_stage=like.zero_stage,
        bytes_per_weight=BYTES[like.dtype],
        tokens=_tokens(recipe, num_sequences),
        gradient_checkpointing=like.gradient_checkpointing,
        has_vocabulary=False,
        offload=like.offload is not None,
        offload_weights=like.offload is not None and like.offload.parameters is not None,
        sequence_parallel=like.sequence_parallel_size,
    )


def reference_load(recipe: GrpoRecipe) -> ReferenceLoad:
    """Of one reference worker, which scores one group at a time."""
    return ReferenceLoad(BYTES[recipe.policy.dtype], _tokens(recipe, recipe.algorithm.num_generations))


def rollout_load(recipe: GrpoRecipe, shape: ModelShape) -> RolloutLoad:
    """Of one GPU of a replica, with the version that is staged on the device."""
    return RolloutLoad(
        tensor_parallel=max(1, recipe.pools.rollout.gpus_per_worker),
        bytes_per_weight=BYTES[recipe.rollout.dtype],
        utilization=recipe.rollout.gpu_memory_utilization,
        max_num_seqs=recipe.rollout.max_num_seqs,
        context=_longest(recipe),
        staged=version_bytes(recipe, shape) if recipe.sync.staging == "device" else 0.0,
    )


def version_bytes(recipe: GrpoRecipe, shape: ModelShape) -> float:
    """Of a version as it travels: the whole model, or the adapters."""
    adapted = _adapted(recipe, shape)
    return float(BYTES[recipe.rollout.dtype] * (shape.num_parameters if adapted is None else adapted))


def _adapted(recipe: Recipe, shape: ModelShape) -> int | None:
    """Elements of the adapters; None without."""
    lora = recipe.policy.lora
    if lora is None:
        return None
    modules = None if lora.target_modules == "all-linear" else tuple(lora.target_modules)
    return shape.adapter_parameters(lora.r, modules)


def _longest(recipe: Recipe) -> int:
    """Tokens of the longest sequence."""
    match recipe:
        case GrpoRecipe():
            return recipe.generation.max_prompt_length + recipe.generation.max_completion_length
        case OfflineRecipe():
            return recipe.max_length


def _per_team(recipe: Recipe) -> int:
    """Sequences of a batch that one rank gets, or one team of ranks, about."""
    match recipe:
        case GrpoRecipe():
            num_sequences = recipe.groups_per_batch * recipe.algorithm.num_generations
        case OfflineRecipe():
            num_sequences = recipe.batch_size * (2 if isinstance(recipe, PreferenceRecipe) else 1)
    return -(-num_sequences // recipe.num_teams)


def _tokens(recipe: Recipe, num_sequences: int) -> int:
    """The most tokens of a forward pass: the budget, but one sequence at least and all that there are at most."""
    longest = _longest(recipe)
    return max(longest, min(recipe.policy.max_tokens_per_micro_batch, num_sequences * longest))
