"""One process of `python -m deploy train`, watched from outside: how far it is, what it has started, how it ended."""

import atexit
import contextlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

import psutil

from deploy.session import shut_in
from tests.chaos.belongings import shared_memory_of, workers_of
from tests.chaos.recipe import ROOT

_FORKS = multiprocessing.get_context("forkserver")
_FORKED: list[str] = []
"""Where the nursery listens, when it does."""
_SAMPLE_S = 1.0
_LOAD_S = 120.0
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_health_check_initial_delay_ms": "0",
}
"""A lost raylet is noticed after seconds, not half a minute."""
AWAY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""What is left of a Ray whose driver was killed waits so long for its head, not a minute."""


def preload() -> None:
    """Drivers and workers are forked from processes that have loaded everything, which are started here, once.

    Drivers look at the environment of this moment.
    """
    if _FORKED:
        return
    folder = tempfile.mkdtemp(prefix="nursery-")
    path = f"{folder}/socket"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nursery = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.nursery", path], env=env, cwd=ROOT, start_new_session=True
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(nursery.kill)
    _FORKS.set_forkserver_preload(["tests.chaos.driver"])
    with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):  # ours stays as it is: this Ray has been imported already
        os.environ.pop("RAY_ADDRESS", None)
        os.environ |= HEALTH | AWAY
        shut_in(os.environ)
        forkserver.ensure_running()
    deadline = time.monotonic() + _LOAD_S
    while not os.path.exists(path):
        assert nursery.poll() is None, "the nursery has ended"
        assert time.monotonic() < deadline, "the nursery takes its time"
        time.sleep(0.05)
    _FORKED.append(path)


_VERSION = re.compile(rb'"event": "(?:trained|resumed)".*"version": (\d+)')


@dataclass(slots=True)
class Journal:
    """How many groups the journal says were trained, also those of histories that were given up; read as it grows."""

    path: Path
    trained: int = 0
    version: int = 0
    """Steps of the history that stands."""
    lines: int = 0
    _offset: int = 0

    def look(self) -> bool:
        """Whether there are new lines."""
        if not self.path.exists():
            self._offset = 0
            return False
        if self.path.stat().st_size < self._offset:
            self._offset = 0  # of a run that began anew
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        self.trained += data[:whole].count(b'"event": "trained"')
        self.lines += data[:whole].count(b"\n")
        versions = _VERSION.findall(data[:whole])
        self.version = int(versions[-1]) if versions else self.version
        return whole > 0


@dataclass(slots=True)
class Life:
    """From the command to its end."""

    engine: str
    folder: Path
    log: Path
    recipe: Path
    started: float = field(default_factory=time.monotonic)
    killed_by_us: bool = False
    asked_to_stop: bool = False
    members: set[psutil.Process] = field(default_factory=set)
    """Every process that was ever seen below it."""
    shared: set[str] = field(default_factory=set)
    """Shared memory that they were seen to have, by name."""
    _sampled: float = 0.0
    _process: object = None
    _said: str = ""
    """What was in its log before that began anew."""

    def start(self) -> None:
        from tests.chaos.driver import life

        arguments = [str(self.recipe)]
        self._process = _FORKS.Process(
            target=life,
            args=(self.engine, str(self.folder / "faults"), str(self.log), _FORKED[0], arguments),
            daemon=False,
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def look(self) -> None:
        """Remember the processes that it has started."""
        if time.monotonic() - self._sampled < _SAMPLE_S:
            return
        self._sampled = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            below = {*psutil.Process(self.pid).children(recursive=True), *workers_of(self.folder / "faults")}
            self.members |= below
            self.shared |= shared_memory_of([psutil.Process(self.pid), *below])

    def kill(self) -> None:
        self._sampled = 0.0
        self.look()
        self.killed_by_us = True
        self._signal(signal.SIGKILL)
        self._process.join(30)

    def terminate(self) -> None:
        self.asked_to_stop = True
        self._signal(signal.SIGTERM)

    def fill_disk(self, size: int) -> bool:
        """No file of the driver grows beyond so many bytes from now on; whether it was still there.

        Its log is one of them, and must have room for the sentence that names the cause: it begins anew.
        """
        self._said += self.log.read_text(errors="replace")
        os.truncate(self.log, 0)
        try:
            resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        except ProcessLookupError:  # it has just ended
            return False
        return True

    def _signal(self, number: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
            psutil.Process(self.pid).send_signal(number)

    def raylet(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = (child for child in psutil.Process(self.pid).children() if child.name() == "raylet")
            return next(found, None)
        return None

    def untyped(self) -> str | None:
        """Why its end is none that the command line promises; None when it is one."""
        text = self._said + (self.log.read_text(errors="replace") if self.log.exists() else "")
        code = self.exit_code
        if "Traceback (most recent call last)" in text:
            return f"exit code {code} with a traceback"
        match code:
            case 0:
                return None
            case -9 if self.killed_by_us:
                return None
            case 75 if self.asked_to_stop:  # which no fault does before this life has trained a step (plan.py)
                return None
            case 1 if re.search(r"^error: \S", text, re.MULTILINE):
                return None
        return f"exit code {code} with no named cause"
