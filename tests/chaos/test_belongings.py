"""What is left behind is counted when it is ours, and only then."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest

from tests.chaos.belongings import left_behind, processes_of, shared_memory_of, workers_of
from tests.chaos.faults import FOLDER
from tests.chaos.nursery import WORKERS

HOLD = """
import sys, time
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(name=sys.argv[1], create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")  # it is left behind
print("made", flush=True)
time.sleep(100)
"""
ORPHAN = "import subprocess as s; print(s.Popen(['sleep', '100'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid, flush=True)"

Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """Programs, by the folder of the run that they belong to."""
    started = []

    def start(program: str, folder: Path | None, *arguments: str) -> subprocess.Popen:
        env = {name: value for name, value in os.environ.items() if name != FOLDER}
        env |= {} if folder is None else {FOLDER: str(folder)}
        command = [sys.executable, "-c", program, *arguments]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def name() -> Iterator[str]:
    name = f"psm_{uuid.uuid4().hex[:12]}"
    yield name
    Path("/dev/shm", name).unlink(missing_ok=True)


def test_an_orphan_is_ours_by_its_environment(start: Start, tmp_path: Path) -> None:
    """Nobody has ever seen it below a driver: its parent was gone at once."""
    parent = start(ORPHAN, tmp_path)
    pid = int(parent.communicate()[0])
    assert psutil.Process(pid).ppid() != parent.pid
    (found,) = left_behind(tmp_path, [], [], timeout_s=0.3)
    assert found.startswith(f"process {pid}: sleep 100")
    assert not processes_of(tmp_path), "and it is ended"


def test_a_worker_that_was_forked_is_ours_by_the_list_of_them(start: Start, tmp_path: Path) -> None:
    """Not by its number alone, which may be another process's by now."""
    ours, other = (psutil.Process(start("import time; time.sleep(100)", None).pid) for _ in range(2))
    lines = [f"{ours.pid} {ours.create_time()}", f"{other.pid} {other.create_time() - 60.0}", "999999999 1.0"]
    (tmp_path / WORKERS).write_text("".join(f"{line}\n" for line in lines))
    assert workers_of(tmp_path) == {ours}
    (found,) = left_behind(tmp_path, [], [], timeout_s=0.3)
    assert found.startswith(f"process {ours.pid}: ")
    assert other.is_running()


def test_a_process_that_ends_in_time_was_not_left(start: Start, tmp_path: Path) -> None:
    process = start("import time; time.sleep(0.5)", tmp_path)
    assert left_behind(tmp_path, [psutil.Process(process.pid)], [], timeout_s=20.0) == []


def test_a_process_that_was_stopped_may_end_by_itself(start: Start, tmp_path: Path) -> None:
    process = start("import time; time.sleep(0.5)", tmp_path)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
    assert left_behind(tmp_path, [psutil.Process(process.pid)], [], timeout_s=20.0) == []


def test_others_are_nothing_to_us(start: Start, name: str, tmp_path: Path) -> None:
    """Another run's orphan and its shared memory, and a Ray's that knows no faults at all."""
    for folder in (tmp_path / "other", None):
        orphan = int(start(ORPHAN, folder).communicate()[0])
        holder = start(HOLD, folder, f"{name}{folder is None}")
        assert holder.stdout.readline() == "made\n"
        assert left_behind(tmp_path, [], [], timeout_s=0.3) == []
        assert psutil.pid_exists(orphan)
        assert Path("/dev/shm", f"{name}{folder is None}").exists()
        psutil.Process(orphan).kill()
        Path("/dev/shm", f"{name}{folder is None}").unlink()


def test_shared_memory_that_outlives_its_maker_is_ours(start: Start, name: str, tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path, name)
    assert holder.stdout.readline() == "made\n"
    seen = shared_memory_of([psutil.Process(holder.pid)])
    assert seen == {name}
    holder.kill()
    holder.wait()
    assert left_behind(tmp_path, [], seen, timeout_s=5.0) == [f"shared memory /dev/shm/{name}"]
    assert not Path("/dev/shm", name).exists()


def test_shared_memory_that_was_given_back_is_not_left(name: str, tmp_path: Path) -> None:
    memory = shared_memory.SharedMemory(name=name, create=True, size=4096)
    try:
        seen = shared_memory_of([psutil.Process()])
        assert name in seen
    finally:
        memory.close()
        memory.unlink()
    assert left_behind(tmp_path, [], seen & {name}, timeout_s=0.3) == []
