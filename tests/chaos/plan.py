"""Which faults there are, by class, and in which order a seed lets them strike."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Outside = Literal["kill", "term", "kill writing", "truncate", "flip", "tear", "full", "raylet"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One class of faults: struck inside a process at a point of its work, or by the harness from outside."""

    inside: tuple[str, str, str] | None = None
    """Role, point and action (faults.py)."""
    outside: Outside | None = None
    """What the harness does to the driver, or to what a dead driver has left on the disk."""
    vllm: bool = False
    """Whether the class makes sense with real engines and a real policy."""

    @property
    def restarts(self) -> bool:
        """Whether the driver ends, and the same command has to go on."""
        return self.outside is not None


CLASSES: dict[str, Kind] = {
    "replica killed idle": Kind(("rollout", "idle", "kill")),
    "replica killed serving": Kind(("rollout", "fill", "kill"), vllm=True),
    "replica killed scoring": Kind(("rollout", "score", "kill"), vllm=True),
    "replica wedged serving": Kind(("rollout", "fill", "stop"), vllm=True),
    "replica hangs scoring": Kind(("rollout", "score", "hang")),
    "replica raises": Kind(("rollout", "fill", "raise"), vllm=True),
    "replica killed joining": Kind(("rollout", "join", "kill")),
    "replica killed at announce": Kind(("rollout", "announce", "kill"), vllm=True),
    "replica killed at a bucket": Kind(("rollout", "bucket", "kill"), vllm=True),
    "replica wedged at a bucket": Kind(("rollout", "bucket", "stop"), vllm=True),
    "replica killed at verify": Kind(("rollout", "verify", "kill"), vllm=True),
    "replica killed at swap": Kind(("rollout", "swap", "kill"), vllm=True),
    "replica wedged at swap": Kind(("rollout", "swap", "stop")),
    "bit flipped in a bucket": Kind(("rollout", "bucket", "flip"), vllm=True),
    "weight spoiled after verify": Kind(("rollout", "swap", "spoil")),
    "reward raises": Kind(("function", "call", "raise"), vllm=True),
    "reward hangs": Kind(("function", "call", "hang"), vllm=True),
    "reward exits": Kind(("function", "call", "exit"), vllm=True),
    "reward segfaults": Kind(("function", "call", "segfault"), vllm=True),
    "reward gives NaN": Kind(("function", "call", "nan"), vllm=True),
    "reward gives too few": Kind(("function", "call", "short"), vllm=True),
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
    "policy killed in a snapshot": Kind(("policy", "snapshot", "kill")),
    "policy killed writing": Kind(("policy", "midwrite", "kill")),
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


def plan(count: int, seed: int, *, restarts: int, vllm: bool, only: str = "") -> list[str]:
    """`count` names of classes in random order, each as often as the others, `restarts` of them ending the driver.

    Classes whose name does not contain `only` are left out.
    """
    rng = random.Random(seed)
    allowed = [name for name, kind in CLASSES.items() if (kind.vllm or not vllm) and only in name]
    if not allowed:
        raise ValueError(f"no class has {only!r} in its name; there are {', '.join(CLASSES)}")
    ending = [name for name in allowed if CLASSES[name].restarts]
    restarts = min(restarts, count) if 0 < len(ending) < len(allowed) else count * bool(ending)
    chosen = _spread(ending, restarts, rng)
    chosen += _spread([name for name in allowed if not CLASSES[name].restarts], count - restarts, rng)
    rng.shuffle(chosen)
    return chosen


def _spread(names: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Every name equally often, to within one."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += rng.sample(names, min(len(names), count - len(chosen)))
    return chosen
