"""`python -m deploy train` as it is, but that policy, critic and engines write down when they compute.

The folder for that is in the environment, which reaches the engines' own processes. With `--light` in front of the
recipe the engines are light ones, which need no model.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray

import deploy.train
from actors.critic import Assessed, CriticActor
from actors.policy import CONTROL, IO, PolicyActor
from actors.policy_calls import RankBatch, RankUpdate
from actors.rollout import RolloutActor
from actors.run.grpo import run_grpo
from actors.workers import Roles
from algorithms.types import Group, ScoredGroup
from deploy.__main__ import app
from sync.receiver import WeightReceiver
from tests.chaos.replica import LightRollout

FOLDER = "PACELINE_TIMES"


def note(kind: str, since: float) -> None:
    """One line in a file of this process: from when to now."""
    with Path(os.environ[FOLDER], f"{kind}-{os.getpid()}").open("a", encoding="utf-8") as file:
        file.write(json.dumps([since, time.monotonic()]) + "\n")


def noted(folder: Path, kind: str) -> list[tuple[float, float]]:
    """All of a kind, in order."""
    lines = (line for path in folder.glob(f"{kind}-*") for line in path.read_text().splitlines())
    return sorted(tuple(json.loads(line)) for line in lines)


class TimedReceiver(WeightReceiver):
    """Every forward pass of the engine is noted."""

    def join_group(self, first: str, host: str) -> None:
        if not hasattr(self, "staging"):
            execute = self.model_runner.execute_model

            def timed(*args: Any, **kwargs: Any) -> Any:
                since = time.monotonic()
                done = execute(*args, **kwargs)
                note("pass", since)
                return done

            self.model_runner.execute_model = timed
        super().join_group(first, host)


class TimedRollout(RolloutActor):
    worker_extension = "tests.deploy.timed_workers.TimedReceiver"


class TimedLight(LightRollout):
    """Every token of the light engine is noted."""

    async def start(self) -> str:
        address = await super().start()
        engine: Any = self.engine
        step = engine._step

        def timed(request: Any) -> None:
            since = time.monotonic()
            step(request)
            note("pass", since)

        engine._step = timed
        return address


class TimedCritic(CriticActor):
    """Every step is noted, and what is said of every batch."""

    def compute_values(self, batch: RankBatch, *groups: ScoredGroup | Group) -> list[list[Assessed]]:
        since = time.monotonic()
        values = super().compute_values(batch, *groups)
        note("values", since)
        return values

    def step(self, batch: RankBatch, *groups: ScoredGroup | Group) -> RankUpdate:
        since = time.monotonic()
        update = super().step(batch, *groups)
        note("critic", since)
        return update


class TimedPolicy(PolicyActor):
    """Every step is noted."""

    def step(self, batch: RankBatch, *groups: ScoredGroup | Group) -> RankUpdate:
        since = time.monotonic()
        update = super().step(batch, *groups)
        note("step", since)
        return update


if __name__ == "__main__":
    here: Any = deploy.train
    remote: Any = ray.remote
    answered = {"concurrency_groups": {CONTROL: 1, IO: 1}}
    light = sys.argv[1] == "--light"
    roles = Roles(
        policy=remote(**answered)(TimedPolicy),
        rollout=remote(TimedLight if light else TimedRollout),
        critic=remote(**answered)(TimedCritic),
    )
    here.run_grpo = partial(run_grpo, roles=roles)
    app(["train", *sys.argv[1 + light :]])
