"""As light_engines, but what is sampled does not depend on the weights: runs whose updates differ by rounding alone
train on the same tokens to the end."""

from collections.abc import Iterable
from typing import Any

import ray
from torch import Tensor

from actors.workers import Roles
from tests.chaos.replica import LightRollout, LightServing
from tests.deploy.light_engines import train_all


class SteadyServing(LightServing):
    def swap(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        super().swap(tensors)
        self.digest = "the same for all weights"


class SteadyRollout(LightRollout):
    async def start(self) -> str:
        ip = await super().start()
        engine: Any = self.engine
        engine.worker.serving = SteadyServing()
        return ip


if __name__ == "__main__":
    remote: Any = ray.remote
    train_all(Roles(rollout=remote(SteadyRollout)))
