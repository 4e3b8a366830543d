"""An actor that is killed leaves no process and nothing in /dev/shm, whoever kills it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.orphans import leave_none

_GONE_WITHIN_S = 30.0


def _share(queue: Any) -> None:
    shared = SharedMemory(create=True, size=4096)
    queue.put(shared.name)
    time.sleep(600.0)


@ray.remote(num_cpus=0)
class Sharing:
    """As an engine does, it shares memory in a process that it has spawned."""

    def share(self) -> tuple[int, str]:
        """The actor's process and the file in /dev/shm."""
        leave_none()
        context = multiprocessing.get_context("spawn")
        queue: Any = context.Queue()
        context.Process(target=_share, args=(queue,), daemon=True).start()
        return os.getpid(), queue.get(timeout=60.0)


def _by_ray(actor: Any, pid: int) -> None:
    ray.kill(actor)


def _by_the_system(actor: Any, pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)


@pytest.mark.cluster
@pytest.mark.parametrize("kill", [_by_ray, _by_the_system])
def test_what_a_killed_actor_shared_is_removed(local_ray: None, kill: Callable[[Any, int], None]) -> None:
    actor = Sharing.remote()  # type: ignore[attr-defined]
    pid, name = ray.get(actor.share.remote(), timeout=90.0)
    shared = Path("/dev/shm") / name
    assert shared.exists()
    kill(actor, pid)
    deadline = time.monotonic() + _GONE_WITHIN_S
    while shared.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not shared.exists()


@pytest.mark.parametrize("leads", [True, False], ids=["it leads its group", "its group is another's"])
def test_what_a_killed_process_had_started_ends_with_it(leads: bool) -> None:
    script = (
        "import subprocess, time; from actors.orphans import leave_none; leave_none(); "
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )
    pipe: Any = {"stdout": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, "-c", script], start_new_session=leads, **pipe)
    left = psutil.Process(int(started.stdout.readline()))
    started.kill()  # it alone
    started.wait(_GONE_WITHIN_S)
    left.wait(_GONE_WITHIN_S)
    assert not left.is_running()
