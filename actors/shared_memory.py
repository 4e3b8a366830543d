"""Shared memory of an engine's processes is removed however they end.

Python's resource tracker removes what its processes leave, once all of them are gone. Ray kills the children and the
process group of an actor that it kills, and so the tracker too: each engine would leave its queues in /dev/shm.
"""

import subprocess
from collections.abc import Sequence
from multiprocessing import resource_tracker, util
from typing import Any

_START_TIMEOUT_S = 30.0


def track_apart() -> None:
    """Start the resource tracker as nobody's child, in a session of its own; call it before anything is shared."""
    spawn = util.spawnv_passfds
    util.spawnv_passfds = _spawn_apart
    try:
        resource_tracker.ensure_running()
    finally:
        util.spawnv_passfds = spawn


def _spawn_apart(path: bytes, args: Sequence[Any], passfds: Sequence[Any]) -> int:
    shell = subprocess.Popen(["/bin/sh", "-c", '"$@" &', "sh", *args], pass_fds=passfds, start_new_session=True)
    shell.wait(_START_TIMEOUT_S)
    return shell.pid
