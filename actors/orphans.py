"""An actor leaves neither processes nor shared memory behind, however it ends.

Ray kills the children and the process group of an actor that ends, but not when it is ended at the same moment itself;
and it kills Python's resource tracker with them, which would have removed what they had shared. So two processes that
are nobody's children stand by: the tracker, and a shell that ends the group when the actor is gone.
"""

import os
import subprocess
from collections.abc import Sequence
from multiprocessing import resource_tracker, util
from typing import Any

_START_TIMEOUT_S = 30.0


def leave_none() -> None:
    """Call it before any process is started and anything is shared."""
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    _guard_group()
    _track_apart()


def _guard_group() -> None:
    """Whoever is left in the group is killed when this process has ended, which closes its end of the pipe."""
    ended, _ = os.pipe()  # our end stays open, and no process that we start has it
    # A shell's background commands get no standard input: they are given a copy.
    script = 'exec 3<&0; { read _ <&3; kill -s KILL -- "-$1"; } &'
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = ["/bin/sh", "-c", script, "sh", str(os.getpid())]
    subprocess.run(command, stdin=ended, start_new_session=True, check=True, timeout=_START_TIMEOUT_S, **quiet)
    os.close(ended)


def _track_apart() -> None:
    """Start the resource tracker as nobody's child, in a session of its own."""
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
