"""Which faults there are, by class, and in which order a seed lets them strike."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outside = Literal["kill", "term", "kill writing", "truncate", "flip", "tear", "full", "raylet"]
Inside = tuple[str, str, str]
"""Role, point and action (faults.py)."""

_LOSING_SHARE = 0.1
"""Of the faults that leave the driver alone: so many lose the policy, which costs seconds each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One class of faults: struck inside a process at a point of its work, or by the harness from outside."""

    inside: Inside | None = None
    outside: Outside | None = None
    """What the harness does to the driver, or to what a dead driver has left on the disk."""
    trigger: Inside | None = None
    """What brings a process to the point, where it would not come by itself."""
    vllm: bool = False
    """Whether the class makes sense with real engines and a real policy."""
    alone: bool = False
    """Whether it can be told only while all replicas are well: where most hold what is wrong, nobody knows."""
    late: bool = False
    """Whether its point is come to after the last step alone."""
    colocated: bool = False
    """Whether its point is come to only where the replicas lie with the policy."""

    @property
    def restarts(self) -> bool:
        """Whether the driver ends, and the same command has to go on."""
        return self.outside is not None

    @property
    def loses_policy(self) -> bool:
        """Whether the policy is built again and goes on from the newest cut."""
        return self.inside is not None and self.inside[0] == "policy" and self.inside[2] != "full"

    @property
    def damages(self) -> bool:
        """Whether a checkpoint that was whole is none any more."""
        return self.outside in ("truncate", "flip")

    @property
    def costs_checkpoint(self) -> bool:
        """Whether there is a checkpoint less than there would be."""
        writing = self.inside is not None and self.inside[1] in ("snapshot", "write", "midwrite")
        return writing or self.damages or self.outside == "kill writing"

    @property
    def needs_checkpoint(self) -> bool:
        """Whether nobody comes to its point before there is a checkpoint."""
        return self.inside is not None and self.inside[1] == "restore"


CLASSES: dict[str, Kind] = {
    "replica killed idle": Kind(("rollout", "idle", "kill")),
    "replica killed serving": Kind(("rollout", "fill", "kill"), vllm=True),
    "replica killed scoring": Kind(("rollout", "score", "kill"), vllm=True),
    "replica wedged serving": Kind(("rollout", "fill", "stop"), vllm=True),
    "replica hangs scoring": Kind(("rollout", "score", "hang")),
    "replica raises": Kind(("rollout", "fill", "raise"), vllm=True),
    "replica killed joining": Kind(("rollout", "join", "kill"), trigger=("rollout", "idle", "kill")),
    "replica killed at announce": Kind(("rollout", "announce", "kill"), vllm=True),
    "replica killed at a bucket": Kind(("rollout", "bucket", "kill"), vllm=True),
    "replica wedged at a bucket": Kind(("rollout", "bucket", "stop"), vllm=True),
    "replica killed at verify": Kind(("rollout", "verify", "kill"), vllm=True),
    "replica killed at swap": Kind(("rollout", "swap", "kill"), vllm=True),
    "replica wedged at swap": Kind(("rollout", "swap", "stop")),
    "replica killed coming to rest": Kind(("rollout", "sleep", "kill"), colocated=True),
    "replica wedged coming to rest": Kind(("rollout", "sleep", "stop"), colocated=True),
    "replica killed at rest": Kind(("rollout", "rest", "kill"), colocated=True),
    "replica killed waking up": Kind(("rollout", "wake", "kill"), colocated=True),
    "bit flipped in a bucket": Kind(("rollout", "bucket", "flip"), vllm=True),
    "weight spoiled after verify": Kind(("rollout", "swap", "spoil"), alone=True),
    "reward raises": Kind(("function", "call", "raise"), vllm=True),
    "reward hangs": Kind(("function", "call", "hang"), vllm=True),
    "reward exits": Kind(("function", "call", "exit"), vllm=True),
    "reward segfaults": Kind(("function", "call", "segfault"), vllm=True),
    "reward gives NaN": Kind(("function", "call", "nan"), vllm=True),
    "reward gives too few": Kind(("function", "call", "short"), vllm=True),
    "reward floods its output": Kind(("function", "call", "flood"), vllm=True),
    "reward worker killed": Kind(("reward", "score", "kill"), vllm=True),
    "reward worker wedged": Kind(("reward", "score", "stop"), vllm=True),
    "reference worker killed": Kind(("reference", "score", "kill")),
    "reference worker wedged": Kind(("reference", "score", "stop")),
    "policy killed in a step": Kind(("policy", "step", "kill")),
    "policy killed in mid-step": Kind(("policy", "midstep", "kill")),
    "policy wedged in a step": Kind(("policy", "step", "stop")),
    "policy raises in a step": Kind(("policy", "step", "raise")),
    "policy killed sending": Kind(("policy", "send", "kill")),
    "policy killed at a bucket": Kind(("policy", "bucket", "kill")),
    "policy killed starting": Kind(("policy", "start", "kill"), trigger=("policy", "step", "kill")),
    "policy killed restoring": Kind(("policy", "restore", "kill"), trigger=("policy", "step", "kill")),
    "policy killed in a snapshot": Kind(("policy", "snapshot", "kill")),
    "policy killed before writing": Kind(("policy", "write", "kill")),
    "policy killed writing": Kind(("policy", "midwrite", "kill")),
    "policy killed saving the model": Kind(("policy", "save", "kill"), late=True),
    "disk full writing a checkpoint": Kind(("policy", "midwrite", "full")),
    "driver killed": Kind(outside="kill", vllm=True),
    "driver terminated": Kind(outside="term", vllm=True),
    "driver killed writing a checkpoint": Kind(outside="kill writing"),
    "newest checkpoint truncated": Kind(outside="truncate"),
    "newest checkpoint flipped": Kind(outside="flip"),
    "journal torn": Kind(outside="tear"),
    "disk full for the driver": Kind(outside="full"),
    "raylet killed": Kind(outside="raylet"),
}


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known of a run when the next fault is chosen."""

    in_flight: Sequence[str]
    """Classes that are armed, or have struck and are not survived yet."""
    most_in_flight: int
    has_trained: bool
    """This life of the driver has trained a step."""
    all_serve: bool
    """The last version reached every replica that the recipe asks for."""
    num_checkpoints: int
    newest_is_new: bool
    """A checkpoint was written since the last fault that cost one."""
    is_late: bool = False
    """The last step is about to be taken."""


def choose(names: Sequence[str], scene: Scene) -> int | None:
    """Place of the class that strikes next; None: wait. One that must be alone lets nothing that is behind it pass."""
    if len(scene.in_flight) >= scene.most_in_flight or any(CLASSES[name].alone for name in scene.in_flight):
        return None
    for place, name in enumerate(names):
        if may_strike(name, scene):
            return place
        if CLASSES[name].alone:
            return None
    return None


def may_strike(name: str, scene: Scene) -> bool:
    """Together with what is in flight; so that no run can be worse off than its guarantees are for."""
    kind = CLASSES[name]
    others = [CLASSES[other] for other in scene.in_flight]
    if kind.alone:
        return not others and scene.all_serve
    if (kind.restarts and not scene.has_trained) or (kind.late and not scene.is_late):
        return False
    if kind.needs_checkpoint and scene.num_checkpoints == 0:
        return False
    if kind.loses_policy and any(other.loses_policy for other in others):
        return False
    if kind.costs_checkpoint and not (scene.newest_is_new and not any(other.costs_checkpoint for other in others)):
        return False
    return not kind.damages or scene.num_checkpoints >= 2


def plan(count: int, seed: int, *, restarts: int, vllm: bool, only: str = "", colocated: bool = False) -> list[str]:
    """`count` names of classes in random order, `restarts` of them ending the driver, a tenth of the others losing the
    policy, and among their like each as often as the others.

    Classes whose name does not contain `only` are left out.
    """
    rng = random.Random(seed)
    allowed = [
        name
        for name, kind in CLASSES.items()
        if (kind.vllm or not vllm) and only in name and (colocated or not kind.colocated)
    ]
    if not allowed:
        raise ValueError(f"no class has {only!r} in its name; there are {', '.join(CLASSES)}")
    ending = [name for name in allowed if CLASSES[name].restarts]
    losing = [name for name in allowed if CLASSES[name].loses_policy]
    light = [name for name in allowed if name not in (*ending, *losing)]
    num_ending = count * bool(ending) if not (losing or light) else min(restarts, count) * bool(ending)
    left = count - num_ending
    num_losing = left if not light else round(_LOSING_SHARE * left) * bool(losing)
    chosen = _spread(ending, num_ending, rng) + _spread(losing, num_losing, rng)
    chosen += _spread(light, left - num_losing, rng)
    rng.shuffle(chosen)
    return chosen


def _spread(names: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Every name equally often, to within one."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += rng.sample(names, min(len(names), count - len(chosen)))
    return chosen
