"""Runs of `python -m deploy train` one after another on one Ray, all real but for engines that need no model.

On standard input: a JSON list of recipes, each a list of its path and its overrides. The argument is the address of a
Ray cluster; without one the runs start their own.
"""

import json
import sys
from functools import partial
from typing import Any

import ray
from rich.console import Console

import deploy.train
from actors.recipe.file import load_recipe
from actors.run.grpo import run_grpo
from actors.workers import Roles
from tests.chaos.replica import LightRollout


def train_all(roles: Roles) -> None:
    here: Any = deploy.train
    here.run_grpo = partial(run_grpo, roles=roles)
    address = sys.argv[1] if len(sys.argv) > 1 else None
    jobs = [
        job
        for path, *overrides in json.load(sys.stdin)
        for job in here.prepare(load_recipe(path, overrides), path, address, False)
    ]
    here.execute(jobs, address, Console())


if __name__ == "__main__":
    train_all(Roles(rollout=ray.remote(LightRollout)))
