"""The real reward actor, which can be struck, and a reference without a model."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from actors.policy import CONTROL
from actors.reference import ReferenceSettings
from actors.reward import RewardActor
from algorithms.types import Group, ScoredGroup
from tests.chaos.faults import strike


class ChaosReward(RewardActor):
    async def score(self, group: Group, completions: list[str]) -> ScoredGroup:
        strike("reward", "score")
        return await super().score(group, completions)


class LightReference:
    def __init__(self, settings: ReferenceSettings) -> None:
        self.settings = settings

    @ray.method(concurrency_group=CONTROL)
    def ping(self) -> int:
        return os.getpid()

    def start(self) -> None:
        strike("reference", "start")

    def score(self, group: Group) -> Group:
        strike("reference", "score")
        return replace(
            group,
            rollouts=tuple(
                replace(rollout, reference_logprobs_T=np.zeros(rollout.num_tokens, np.float32))
                for rollout in group.rollouts
            ),
        )


def light_reference() -> Any:
    remote: Any = ray.remote
    return remote(concurrency_groups={CONTROL: 1})(LightReference)
