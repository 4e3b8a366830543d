"""What is on one GPU that pools share, at the two moments of a step; where it does not fit, the fix has been tried.

While the policy computes the engines sleep: their weights and KV cache are not there (vLLM's sleep mode). While
replicas sample the policy holds what lasts from step to step, and nothing of a step. A critic or a reference on the
same GPU may be at its own worst at both. None of this has been held against a GPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import floor

from placement.memory.fit import MemoryShortageError, PolicyKnob, is_enough, policy_knobs, total
from placement.memory.footprint import (
    CONTEXT,
    GB,
    PolicyLoad,
    RolloutLoad,
    policy_footprint,
    rollout_footprint,
)
from placement.memory.shape import ModelShape

ASLEEP = CONTEXT + 1.0 * GB
"""Of an engine that sleeps: its CUDA context and its CUDA graphs; a guess from above."""
_LASTING = ("weights", "gradients", "optimizer", "buffers")
"""Of a policy's rank, what stays between two steps. (DeepSpeed keeps some of its sums of gradients, not all.)"""
COMPUTES, SAMPLE = "the policy computes", "replicas sample"

Moments = Mapping[str, Mapping[str, float]]
"""Bytes by pool, at each moment."""


@dataclass(frozen=True, slots=True)
class SharedLoad:
    """What decides the memory of a GPU of the policy that others lie on."""

    shape: ModelShape
    policy: PolicyLoad
    rollout: RolloutLoad | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    """Bytes of critic and reference, at their worst."""


def moments(load: SharedLoad, gpu_bytes: float | None) -> Moments:
    """Both moments, or the one that there is when no replica shares the GPU."""
    policy = policy_footprint(load.shape, load.policy)
    computes = {"policy": total(policy), **load.others}
    if load.rollout is None:
        return {COMPUTES: computes}
    awake = total(rollout_footprint(load.shape, load.rollout, gpu_bytes))
    lasting = sum(policy[part] for part in _LASTING)
    return {
        COMPUTES: {**computes, "rollout": ASLEEP + load.rollout.staged},
        SAMPLE: {"policy": lasting, **load.others, "rollout": awake},
    }


def check_shared(load: SharedLoad, gpu_bytes: float, shortest: int) -> None:
    """MemoryShortageError when a moment does not fit; `shortest`: a micro-batch holds one sequence at least."""
    if _fits(load, gpu_bytes):
        return
    found = moments(load, gpu_bytes)
    moment = max(found, key=lambda name: sum(found[name].values()))
    needs = sum(found[moment].values())
    fixes = [text for text, changed in _knobs(load, gpu_bytes, shortest) if _fits(changed, gpu_bytes)]
    parts = ", ".join(f"{pool!r} {size / GB:.1f}" for pool, size in found[moment].items())
    pools = " and ".join(map(repr, found[moment]))
    raise MemoryShortageError(
        f"the GPUs that {pools} share need {needs / GB:.1f} GB while {moment}, and have {gpu_bytes / GB:g}: "
        f"{(needs - gpu_bytes) / GB:.1f} GB are missing ({parts}); set "
        f"{', or '.join(fixes[:2]) or 'no colocate_with, so that they have GPUs of their own'}"
    )


def _fits(load: SharedLoad, gpu_bytes: float) -> bool:
    enough = load.rollout is None or is_enough(load.shape, load.rollout, gpu_bytes)
    return enough and all(sum(pools.values()) <= gpu_bytes for pools in moments(load, gpu_bytes).values())


def _knobs(load: SharedLoad, gpu_bytes: float, shortest: int) -> Iterator[tuple[str, SharedLoad]]:
    """Changes that may help, as they are written on the command line: of the engines, of the policy, of both."""
    yield from _for_engines("", load, gpu_bytes)
    knobs = [*policy_knobs(load.policy, shortest, "policy")]
    if not load.policy.offload and load.policy.zero_stage:
        knobs.insert(0, PolicyKnob("policy.offload='{optimizer: cpu}'", replace(load.policy, offload=True)))
    changed = [(knob.text, replace(load, policy=knob.load)) for knob in knobs if knob.text]
    yield from changed
    for text, other in changed:
        yield from _for_engines(f"{text} ", other, gpu_bytes)


def _for_engines(text: str, load: SharedLoad, gpu_bytes: float) -> Iterator[tuple[str, SharedLoad]]:
    """The largest share for vLLM that leaves the others their own."""
    if load.rollout is None:
        return
    others = sum(size for pool, size in moments(load, gpu_bytes)[SAMPLE].items() if pool != "rollout")
    share = floor(100 * (gpu_bytes - others - load.rollout.staged) / gpu_bytes) / 100
    if 0.0 < share < load.rollout.utilization:
        changed = replace(load, rollout=replace(load.rollout, utilization=share))
        yield f"{text}rollout.gpu_memory_utilization={share:g}", changed
