"""`python -m deploy train` as it is, but for the classes behind the roles of the run."""

import ctypes
import os
import signal
import sys
from functools import partial
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.node import Node

import deploy.train
from actors.run.grpo import run_grpo
from actors.workers import Roles
from deploy.__main__ import app
from tests.chaos.faults import FOLDER
from tests.chaos.nursery import SOCKET
from tests.chaos.policy import light_policy
from tests.chaos.recipe import ROOT
from tests.chaos.replica import LightRollout, VllmRollout
from tests.chaos.scorers import ChaosReward, light_reference

_PR_SET_PDEATHSIG = 1


def roles(engine: str) -> Roles:
    reward: Any = ray.remote(ChaosReward)
    if engine == "vllm":
        return Roles(rollout=ray.remote(VllmRollout), reward=reward)
    return Roles(light_policy(), ray.remote(LightRollout), reward, light_reference())


def main(engine: str, arguments: list[str]) -> None:
    """Exits as the command line does."""
    here: Any = deploy.train
    here.run_grpo = partial(run_grpo, roles=roles(engine))
    app(["train", *arguments])


def life(engine: str, faults: str, log: str, nursery: str, arguments: list[str]) -> None:
    """The same in a process that has been forked with all modules loaded, which saves seconds.

    So are the workers of light engines (nursery.py); real ones start as they do for everybody. The process ends with
    the one that it was forked from, and so with the campaign, however that ends.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ[FOLDER] = faults
    if engine == "light":
        os.environ[SOCKET] = nursery
        ray_constants.SETUP_WORKER_FILENAME = str(ROOT / "tests" / "chaos" / "nursery.py")
        _start_little()
    main(engine, arguments)


def _start_little() -> None:
    """Ray's head without the services that no run of ours uses: autoscaler, dashboard, forwarding of logs."""

    def no_dashboard(node: Any, **_: Any) -> None:
        node._webui_url = ""

    head: Any = Node
    head.start_monitor = head.start_log_monitor = lambda node: None
    head.start_api_server = no_dashboard


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
