"""What a run's own processes have started and left behind, and nothing of anybody else's.

A process is the run's when its environment names the folder of the run's faults (everything that a driver starts
inherits that) or when it was forked for the run (nursery.py), and shared memory is the run's when one of its processes
was seen to have it open or mapped. Another Ray on the machine has neither.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from tests.chaos.faults import FOLDER
from tests.chaos.nursery import WORKERS

SHARED = "/dev/shm/"
_AGAIN_S = 0.2


def processes_of(folder: Path) -> set[psutil.Process]:
    """Whatever was started with the faults of this run in its environment, whoever its parent is now."""
    found = workers_of(folder)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(FOLDER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def workers_of(folder: Path) -> set[psutil.Process]:
    """Those that were forked, and are there."""
    found = set()
    path = folder / WORKERS
    for line in path.read_text().splitlines() if path.exists() else ():
        pid, began = line.split()
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if process.create_time() == float(began) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def shared_memory_of(processes: Iterable[psutil.Process]) -> set[str]:
    """Names of the files of shared memory that they have open or mapped."""
    names: set[str] = set()
    for process in processes:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            paths = [line.partition(SHARED)[2] for line in maps.splitlines() if SHARED in line]
            names.update(path for path in paths if not path.endswith(" (deleted)"))
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):
                    path = os.readlink(descriptor.path)
                    if path.startswith(SHARED) and not path.endswith(" (deleted)"):
                        names.add(path.removeprefix(SHARED))
    return names


def left_behind(folder: Path, known: Iterable[psutil.Process], shared: Iterable[str], timeout_s: float) -> list[str]:
    """Processes of a run that is over which are there after so long, and its shared memory; both are ended now.

    `known` are processes and `shared` the names of shared memory that were seen while the run went on. One that was
    stopped by a fault is let go on now: nothing ends by itself that does nothing.
    """
    deadline = time.monotonic() + timeout_s
    known = set(known)
    while alive := {process for process in known if _runs(process)} | processes_of(folder):
        if time.monotonic() > deadline:
            break
        for process in alive:
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    process.resume()
        time.sleep(_AGAIN_S)
    shared = set(shared) | shared_memory_of(alive)
    found = []
    for process in alive:
        with contextlib.suppress(psutil.Error):
            found.append(f"process {process.pid}: {' '.join(process.cmdline())[:120]}")
            process.kill()
    psutil.wait_procs(alive, timeout=10.0)
    for name in sorted(shared):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SHARED + name)
            found.append(f"shared memory {SHARED}{name}")
    return found


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
