"""What a machine offers, read there without starting anything, and whether it is enough for the workers on it."""

import contextlib
import os
import platform
import resource
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.doctor.check import Finding, failed, passed, skipped, warned
from deploy.doctor.gpus import gpus_gb, listed
from deploy.doctor.versions import CORE, installed

GB = 2**30
_SHM = Path("/dev/shm")
_OBJECT_STORE_SHARE = 0.3
_OBJECT_STORE_CAP, _OBJECT_STORE_FLOOR = 200e9, 10e9
"""How large Ray makes its object store: a share of the memory, at most so much, and in /dev/shm where that has room for
it; a store below the floor may be in /tmp instead, where it is slow."""
_SHM_PER_ENGINE = 0.5 * GB
"""vLLM's queues to and from its worker processes: ten pieces of 16 MiB and more each way, and NCCL's own."""
_FILES_PER_WORKER, _FILES_OF_RAY = 512, 2048
_TASKS_PER_WORKER, _TASKS_OF_RAY = 300, 600
"""Processes and threads: a worker with its engine, or its child, has 100 to 300, by cores."""
_PORTS_PER_WORKER, _PORTS_OF_RAY = 8, 64


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine; amounts in bytes."""

    host: str
    packages: dict[str, str | None]
    """The versions of those that must be the same on every node."""
    memory: float
    shm_free: float
    files: int
    """Most open files of a process, its hard limit: Ray's processes raise their own to it."""
    tasks: int | None
    """Processes and threads that may yet be started; None without a limit."""
    ports: int
    """Ports that could be opened at one time, of those that were tried."""
    gpus_gb: tuple[float, ...] = ()
    """Memory of each GPU."""


def this_machine(num_ports: int) -> Machine:
    """The machine that this runs on; it opens `num_ports` ports for a moment."""
    return Machine(
        host=platform.node() or "localhost",
        packages={"python": platform.python_version(), **{name: installed(name) for name in sorted(CORE)}},
        memory=float(min(psutil.virtual_memory().total, _cgroup("memory.max") or float("inf"))),
        shm_free=float(shutil.disk_usage(_SHM).free) if _SHM.is_dir() else 0.0,
        files=_unlimited(resource.getrlimit(resource.RLIMIT_NOFILE)[1]) or 2**30,
        tasks=_tasks_left(),
        ports=_open_ports(num_ports),
        gpus_gb=gpus_gb(listed()),
    )


def check_shm(machine: Machine, num_engines: int) -> Finding:
    """Ray's object store goes elsewhere when it must, and vLLM's queues cannot."""
    store = object_store_bytes(machine.memory, machine.shm_free)
    engines = num_engines * _SHM_PER_ENGINE
    has = f"{machine.host}: /dev/shm has {machine.shm_free / GB:.1f} GB free"
    if machine.shm_free < engines:
        return failed(
            f"{has}, and {num_engines} engine{'s' * (num_engines != 1)} may need {engines / GB:.1f}",
            f"give it {(store + engines) / GB:.0f} GB (docker run --shm-size, or an emptyDir of medium Memory)",
        )
    if machine.shm_free < store + engines:
        return warned(
            f"{has}; Ray's object store takes {store / GB:.1f}, engines {engines / GB:.1f}: one may be slow, or fail",
            f"give it {(store + engines) / GB:.0f} GB (docker run --shm-size, or an emptyDir of medium Memory)",
        )
    return passed(f"{has}, of which Ray's object store takes {store / GB:.1f} at most")


def object_store_bytes(memory: float, shm_free: float) -> float:
    """What Ray takes for its objects when it is not told."""
    return min(_OBJECT_STORE_SHARE * memory, _OBJECT_STORE_CAP, max(_OBJECT_STORE_FLOOR, 0.95 * shm_free))


def check_limits(machine: Machine, num_workers: int) -> Finding:
    """Open files of a process, and how many processes and threads may be started."""
    files = _FILES_OF_RAY + _FILES_PER_WORKER * num_workers
    tasks = _TASKS_OF_RAY + _TASKS_PER_WORKER * num_workers
    if machine.files < files:
        return warned(
            f"{machine.host}: a process may open {machine.files} files, and {num_workers} workers may take {files}",
            "raise the limit (ulimit -n, LimitNOFILE= of systemd, docker run --ulimit nofile=65536)",
        )
    if machine.tasks is not None and machine.tasks < tasks:
        return warned(
            f"{machine.host}: {machine.tasks} more processes and threads are allowed, and {num_workers} workers may "
            f"start {tasks}",
            "raise the limit (ulimit -u, TasksMax= of systemd, docker run --pids-limit)",
        )
    room = "no limit of processes" if machine.tasks is None else f"{machine.tasks} processes and threads"
    return passed(f"{machine.host}: {machine.files} open files, {room}")


def num_ports(num_workers: int) -> int:
    """Ports that Ray, the engines and the groups of workers open on one machine."""
    return _PORTS_OF_RAY + _PORTS_PER_WORKER * num_workers


def check_ports(machine: Machine, wanted: int) -> Finding:
    if machine.ports < wanted:
        return failed(
            f"{machine.host}: {machine.ports} of {wanted} ports could be opened",
            "widen net.ipv4.ip_local_port_range, or end what holds so many ports",
        )
    return passed(f"{machine.host}: {wanted} ports could be opened")


def check_same(machine: Machine, ours: Machine) -> Finding:
    """Two versions of one package on two nodes read one run's messages in two ways."""
    others = {name: version for name, version in machine.packages.items() if version != ours.packages[name]}
    if others:
        theirs = ", ".join(
            f"{name} {version or 'missing'} (here {ours.packages[name]})" for name, version in others.items()
        )
        return failed(f"{machine.host}: {theirs}", "run the same image on every node")
    return passed(f"{machine.host}: Python and {len(machine.packages) - 1} packages as on this machine")


def check_memory(machine: Machine, needed: float | None) -> Finding:
    """The host's own, against what its workers hold there at the worst moment; None: it is not known."""
    if needed is None:
        return skipped(f"{machine.host}: not estimated: the model is tiny, or its config.json is not here")
    has = machine.memory / GB
    if needed > machine.memory:
        return failed(
            f"{machine.host}: its workers hold {needed / GB:.1f} GB in its memory, which has {has:.1f}",
            "spread the policy over more nodes, or lower pools.policy.num_workers (docs/sizing.md)",
        )
    if needed > 0.8 * machine.memory:
        return warned(
            f"{machine.host}: its workers hold {needed / GB:.1f} GB of {has:.1f}, beside what processes take",
            "leave a fifth of it free (docs/sizing.md)",
        )
    return passed(f"{machine.host}: {has:.1f} GB of memory, of which workers hold {needed / GB:.1f} beside processes")


def _open_ports(wanted: int) -> int:
    """How many ports can be open at one time, up to `wanted`."""
    with contextlib.ExitStack() as held:
        for number in range(wanted):
            try:
                held.enter_context(socket.create_server(("", 0)))
            except OSError:
                return number
    return wanted


def _tasks_left() -> int | None:
    """By the user's limit and the container's, whichever comes first."""
    left = []
    if (most := _cgroup("pids.max")) is not None:
        left.append(int(most) - int(_cgroup("pids.current") or 0))
    user = _unlimited(resource.getrlimit(resource.RLIMIT_NPROC)[0])
    if user is not None and os.geteuid() != 0:  # root has no limit
        left.append(user - _tasks_of(os.geteuid()))
    return min(left, default=None)


def _tasks_of(user: int) -> int:
    """Threads of the user's processes; what cannot be looked at is another's."""
    count = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids, threads = process.info["uids"], process.info["num_threads"]
        if uids is not None and uids.real == user:
            count += threads or 1
    return count


def _unlimited(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _cgroup(name: str) -> float | None:
    """A number of the control group that this process is in, version 2; None without one."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text("utf-8").splitlines()[-1].rpartition("::")[2]
        for folder in (Path("/sys/fs/cgroup") / group.strip("/"), Path("/sys/fs/cgroup")):
            if (folder / name).is_file():
                return float((folder / name).read_text("utf-8"))
    return None
