"""A group goes, whole, to the replica with the fewest groups outstanding."""

from collections.abc import Sequence

import ray

from algorithms.types import Prompt


class Router:
    """Least outstanding first; ties go to the lower number."""

    def __init__(self, replicas: Sequence[ray.actor.ActorHandle]) -> None:
        self._replicas = replicas
        self._outstanding = [0] * len(replicas)

    def choose(self) -> int:
        """The replica for the next group."""
        return min(range(len(self._replicas)), key=lambda index: (self._outstanding[index], index))

    def dispatch(self, index: int, prompt: Prompt, attempt: int) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """Send the group to replica `index`; references to its summary and to the scored group."""
        self._outstanding[index] += 1
        references: tuple[ray.ObjectRef, ray.ObjectRef] = self._replicas[index].fill.remote(prompt, attempt)
        return references

    def done(self, index: int) -> None:
        """The group has left the replica, finished or not."""
        self._outstanding[index] -= 1
