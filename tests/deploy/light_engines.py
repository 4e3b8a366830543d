"""`python -m deploy train` as it is, with a real policy, reference and rewards, but engines that need no model."""

import sys
from functools import partial
from typing import Any

import ray

import deploy.train
from actors.run.grpo import run_grpo
from actors.workers import Roles
from deploy.__main__ import app
from tests.chaos.replica import LightRollout

if __name__ == "__main__":
    here: Any = deploy.train
    here.run_grpo = partial(run_grpo, roles=Roles(rollout=ray.remote(LightRollout)))
    app(["train", *sys.argv[1:]])
