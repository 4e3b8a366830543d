"""A pool that cannot fit is refused with what is missing and the knob that makes it fit, which has been tried."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Literal

from placement.memory.footprint import (
    GB,
    Footprint,
    PolicyLoad,
    ReferenceLoad,
    RolloutLoad,
    kv_bytes,
    policy_footprint,
    reference_footprint,
    rollout_footprint,
)
from placement.memory.shape import ModelShape

_MAX_RANKS = 1024
_MAX_PARALLEL = 8
"""GPUs of one node, which a replica never leaves."""
_MIN_TOKENS = 256


class MemoryShortageError(ValueError):
    """A pool's share does not fit on its GPUs; the message names the pool, the shortage and the fix."""


@dataclass(frozen=True, slots=True)
class PolicyKnob:
    """Changes of the recipe, as they are written on the command line, and the load that they lead to."""

    text: str
    load: PolicyLoad


@dataclass(frozen=True, slots=True)
class RolloutKnob:
    """The same for a replica."""

    text: str
    load: RolloutLoad


def total(footprint: Footprint) -> float:
    return sum(footprint.values())


def check_policy(
    shape: ModelShape, load: PolicyLoad, gpu_bytes: float, shortest: int, pool: Literal["policy", "critic"] = "policy"
) -> None:
    """MemoryShortageError when a rank does not fit; `shortest`: a micro-batch holds one sequence at least."""
    footprint = policy_footprint(shape, load)
    if total(footprint) <= gpu_bytes:
        return
    knobs = [
        knob for knob in policy_knobs(load, shortest, pool) if total(policy_footprint(shape, knob.load)) <= gpu_bytes
    ]
    single = [knob for knob in knobs if " " not in knob.text and knob.load.num_ranks == load.num_ranks]
    last = "policy.lora to train adapters, shorten generation.max_completion_length, or take GPUs with more memory"
    if pool == "critic":
        last = "critic.model to a smaller model, or take GPUs with more memory"
    if load.bytes_per_weight == 4:
        half = _in_half(load, pool)
        single += [half] if total(policy_footprint(shape, half.load)) <= gpu_bytes else []
    if not single:
        teams = _in_teams(shape, load, pool)
        single = [knob for knob in teams if total(policy_footprint(shape, knob.load)) <= gpu_bytes]
    fixes = _first_of_each(knob.text for knob in single) or [knob.text for knob in knobs[:1]]
    fewest = next((knob.text for knob in knobs if knob.load.num_ranks > load.num_ranks), None)
    if fewest is not None and fewest not in fixes:
        fixes.append(fewest)
    raise MemoryShortageError(_lacks(pool, footprint, gpu_bytes, fixes or [last]))


def _in_half(load: PolicyLoad, pool: str) -> PolicyKnob:
    """In bfloat16, for which there is no stage 0."""
    text = f"{pool}.dtype=bfloat16" + (f" {pool}.zero_stage=1" if load.zero_stage == 0 else "")
    return PolicyKnob(text, replace(load, bytes_per_weight=2, zero_stage=max(1, load.zero_stage)))


def _in_teams(shape: ModelShape, load: PolicyLoad, pool: str) -> Iterator[PolicyKnob]:
    """Larger teams of the same ranks, which can share out the model's heads; the smallest first."""
    size = 2 * load.sequence_parallel
    while size <= load.num_ranks:
        if load.num_ranks % size == 0 and shape.can_share_heads(size):
            yield PolicyKnob(f"{pool}.sequence_parallel_size={size}", replace(load, sequence_parallel=size))
        size *= 2


def policy_knobs(load: PolicyLoad, shortest: int, pool: str) -> Iterator[PolicyKnob]:
    """Changes that may help, those with as many ranks first, and the gentlest of them first."""
    ranks = load.num_ranks
    while ranks <= _MAX_RANKS:
        changes = [(), (f"pools.{pool}.num_workers={ranks}",)][ranks > load.num_ranks]
        knobs = [_knob(replace(load, num_ranks=ranks), pool, changes, *each) for each in _settings(load, shortest)]
        yield from sorted(knobs, key=lambda knob: knob.text.count(" "))
        ranks *= 2


def _settings(load: PolicyLoad, shortest: int) -> Iterator[tuple[bool, int, int]]:
    """Checkpointing, stage and tokens, as they are or thriftier; what costs least speed first."""
    halved = [load.tokens]
    while halved[-1] // 2 >= max(shortest, _MIN_TOKENS):
        halved.append(halved[-1] // 2)
    for tokens in halved:
        for stage in range(load.zero_stage, 3 if load.four_bits else 4):
            for checkpointing in sorted({load.gradient_checkpointing, True}):
                yield checkpointing, stage, tokens


def _knob(
    load: PolicyLoad, pool: str, changes: tuple[str, ...], checkpointing: bool, stage: int, tokens: int
) -> PolicyKnob:
    """Checkpointing and tokens are one key for policy and critic."""
    if checkpointing != load.gradient_checkpointing:
        changes += ("policy.gradient_checkpointing=true",)
    if stage != load.zero_stage:
        changes += (f"{pool}.zero_stage={stage}",)
    if tokens != load.tokens:
        changes += (f"policy.max_tokens_per_micro_batch={tokens}",)
    changed = replace(load, gradient_checkpointing=checkpointing, zero_stage=stage, tokens=tokens)
    return PolicyKnob(" ".join(changes), changed)


def check_reference(shape: ModelShape, load: ReferenceLoad, gpu_bytes: float, shortest: int) -> None:
    """MemoryShortageError when a worker does not fit: it holds the model whole."""
    footprint = reference_footprint(shape, load)
    if total(footprint) <= gpu_bytes:
        return
    tokens = load.tokens // 2
    while tokens >= max(shortest, _MIN_TOKENS):
        if total(reference_footprint(shape, replace(load, tokens=tokens))) <= gpu_bytes:
            raise MemoryShortageError(
                _lacks("reference", footprint, gpu_bytes, [f"policy.max_tokens_per_micro_batch={tokens}"])
            )
        tokens //= 2
    fixes = ["algorithm.beta=0, which needs no reference"]
    if load.bytes_per_weight == 4:
        fixes.insert(0, "policy.dtype=bfloat16")
    raise MemoryShortageError(_lacks("reference", footprint, gpu_bytes, fixes))


def check_rollout(shape: ModelShape, load: RolloutLoad, gpu_bytes: float) -> None:
    """MemoryShortageError when a replica cannot hold one sequence at its longest, or takes more than there is."""
    if is_enough(shape, load, gpu_bytes):
        return
    footprint = dict(rollout_footprint(shape, load, gpu_bytes))
    least = load.context * kv_bytes(shape, load)
    missing = max(least - footprint["KV cache"], total(footprint) - gpu_bytes)
    footprint["KV cache"] = max(least, footprint["KV cache"])
    fitting = (knob for knob in _rollout_knobs(shape, load) if is_enough(shape, knob.load, gpu_bytes))
    fixes = _first_of_each(knob.text for knob in fitting)
    last = "shorten generation.max_completion_length, or take GPUs with more memory"
    has = f"which has {gpu_bytes / GB:g}, {load.utilization * gpu_bytes / GB:.1f} of them for vLLM"
    raise MemoryShortageError(_shortage("rollout", footprint, has, missing, fixes or [last]))


def is_enough(shape: ModelShape, load: RolloutLoad, gpu_bytes: float) -> bool:
    footprint = rollout_footprint(shape, load, gpu_bytes)
    return sequences(shape, load, gpu_bytes) >= 1 and total(footprint) <= gpu_bytes


def sequences(shape: ModelShape, load: RolloutLoad, gpu_bytes: float) -> int:
    """How many sequences at their longest a replica's KV cache holds; vLLM lets the others wait."""
    room = rollout_footprint(shape, load, gpu_bytes)["KV cache"]
    return max(0, floor(room / (load.context * kv_bytes(shape, load))))


def _rollout_knobs(shape: ModelShape, load: RolloutLoad) -> Iterator[RolloutKnob]:
    if load.staged:
        yield RolloutKnob("sync.staging=host", replace(load, staged=0.0))
    for percent in (80, 85, 90, 92, 70, 60):
        share = percent / 100
        if share != load.utilization:
            yield RolloutKnob(f"rollout.gpu_memory_utilization={share:g}", replace(load, utilization=share))
    parallel = 2 * load.tensor_parallel
    while parallel <= _MAX_PARALLEL:
        if shape.num_heads % parallel == 0:
            yield RolloutKnob(f"pools.rollout.gpus_per_worker={parallel}", replace(load, tensor_parallel=parallel))
        parallel *= 2


def _lacks(pool: str, footprint: Footprint, gpu_bytes: float, fixes: Sequence[str]) -> str:
    return _shortage(pool, footprint, f"which has {gpu_bytes / GB:g}", total(footprint) - gpu_bytes, fixes)


def _shortage(pool: str, footprint: Footprint, has: str, missing: float, fixes: Sequence[str]) -> str:
    """One sentence: who lacks how much of what, and what to set."""
    parts = ", ".join(f"{part} {size / GB:.1f}" for part, size in footprint.items())
    return (
        f"pool {pool!r} needs {total(footprint) / GB:.1f} GB on each GPU, {has}: {missing / GB:.1f} GB are missing "
        f"({parts}); set {', or '.join(fixes)}"
    )


def _first_of_each(fixes: Iterable[str]) -> list[str]:
    """Of several values of one knob the gentlest alone."""
    kept: dict[str, str] = {}
    for fix in fixes:
        kept.setdefault(fix.partition("=")[0], fix)
    return list(kept.values())
