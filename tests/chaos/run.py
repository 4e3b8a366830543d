"""One chaos run: as many lives of the same command as the faults need, until the last step is taken."""

import math
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.faults import arm, has_fired, prepare
from tests.chaos.life import Journal, Life
from tests.chaos.plan import CLASSES, Kind
from tests.chaos.recipe import write_recipe

GROUPS_PER_BATCH = 4
HANG_S = {"light": 60.0, "vllm": 180.0}
"""Nothing new in the journal for so long is a hang; a real engine alone takes half of it to start."""
START_S = {"light": 120.0, "vllm": 400.0}
"""The same before the first line of a life."""
_POLL_S = 0.05
_PATIENCE_S = 20.0
"""A fault whose point is not come to for so long is taken back, and comes again later."""
_MAX_LIVES_IN_VAIN = 4


@dataclass(slots=True)
class Outcome:
    """What became of one fault."""

    name: str
    seconds: float = 0.0
    """Until a further step was trained; less than the time that a replacement takes, where others go on."""
    survived: bool = False


@dataclass(slots=True)
class ChaosRun:
    """`drive` it, then audit its folder."""

    engine: str
    folder: Path
    seed: int
    steps: int
    names: list[str]
    """Classes of the faults that are to strike, in order."""
    tick: Callable[[str], None]
    """Told of every fault that has struck."""
    deadline: float = math.inf
    """No fault strikes after this time.monotonic() moment."""
    outcomes: list[Outcome] = field(default_factory=list)
    hangs: int = 0
    untyped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    complete: bool = False
    _rng: random.Random = field(default_factory=random.Random)
    _waiting: Outcome | None = None
    """The last fault, until a step is trained after it."""
    _struck: float = 0.0
    _progress: float = 0.0
    _trained_when_struck: int = 0
    _armed: tuple[str, str, float] | None = None  # file name, class, since when
    _number: int = 0
    _vain: int = 0

    def drive(self) -> None:
        """Until the run is complete, or does not come any further."""
        self._rng.seed(self.seed)
        recipe = write_recipe(
            self.folder,
            steps=self.steps,
            seed=self.seed,
            max_staleness=self._rng.choice((0, 1, 1, 2)),
            num_ranks=self._rng.choice((1, 1, 2)),
            engine=self.engine,
        )
        prepare(self.folder / "faults")
        journal = Journal(self.folder / "run" / "ledger.jsonl")
        try:
            while not self.complete and self._vain < _MAX_LIVES_IN_VAIN:
                before = journal.trained
                self._live(recipe, journal)
                self._vain = 0 if journal.trained > before else self._vain + 1
        finally:
            if self.lives and self.lives[-1].exit_code is None:  # we are being ended
                self.lives[-1].kill()
        if not self.complete:
            self.hangs += 1
            self.notes.append(f"{self.folder}: {_MAX_LIVES_IN_VAIN} lives without a step; see the last log")

    def _live(self, recipe: Path, journal: Journal) -> None:
        life = Life(self.engine, self.folder, self.folder / f"log-{len(self.lives):03d}", recipe)
        self.lives.append(life)
        life.start()
        self._progress, patience_s = time.monotonic(), START_S[self.engine]
        while life.exit_code is None:
            life.look()
            if journal.look():
                self._progress, patience_s = time.monotonic(), HANG_S[self.engine]
            if time.monotonic() - self._progress > patience_s:
                self.hangs += 1
                self.notes.append(f"{life.log}: nothing new in the journal for {patience_s:g} s")
                life.kill()
                break
            if not (life.killed_by_us or life.asked_to_stop):
                self._step(life, journal)
            time.sleep(_POLL_S)
        journal.look()
        self._settle(journal)
        if (cause := life.untyped()) is not None:
            self.untyped.append(f"{life.log}: {cause}")
        self.complete = life.exit_code == 0

    def _step(self, life: Life, journal: Journal) -> None:
        """Go on with the faults: note what has struck, and let the next one strike when the run has gone on."""
        self._settle(journal)
        if self._armed is not None:
            file, name, since = self._armed
            if has_fired(self.folder / "faults", file):
                self._armed = None
                self._strike(name, journal)
                if CLASSES[name].outside == "kill writing":
                    life.kill()
            elif time.monotonic() - since > _PATIENCE_S:
                (self.folder / "faults" / "armed" / file).unlink(missing_ok=True)
                self._armed = None
                self.names.append(name)
            return
        if self._waiting is not None or not self.names or journal.trained < GROUPS_PER_BATCH:
            return
        if time.monotonic() > self.deadline:
            self.names.clear()
            return
        name = self.names.pop(0)
        kind = CLASSES[name]
        inside = ("policy", "midwrite", "slow") if kind.outside == "kill writing" else kind.inside
        if inside is not None:
            self._number += 1
            file = ".".join((*inside, f"{self._number:04d}"))
            arm(self.folder / "faults", file)
            self._armed = file, name, time.monotonic()
            return
        time.sleep(self._rng.random())  # a random moment
        if life.exit_code is None:
            self._outside(kind, life)
            self._strike(name, journal)

    def _strike(self, name: str, journal: Journal) -> None:
        journal.look()
        self._waiting = Outcome(name)
        self._struck, self._trained_when_struck = time.monotonic(), journal.trained
        self.outcomes.append(self._waiting)
        self.tick(name)

    def _settle(self, journal: Journal) -> None:
        """The last fault is survived when the run has trained another whole step."""
        if self._waiting is not None and journal.trained >= self._trained_when_struck + GROUPS_PER_BATCH:
            self._waiting.survived = True
            self._waiting.seconds = time.monotonic() - self._struck
            self._waiting = None

    def _outside(self, kind: Kind, life: Life) -> None:
        match kind.outside:
            case "term":
                life.terminate()
            case "full":
                size = (self.folder / "run" / "ledger.jsonl").stat().st_size
                resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            case "raylet":
                raylet = life.raylet()
                if raylet is not None:
                    raylet.send_signal(signal.SIGKILL)
            case _:
                life.kill()
        match kind.outside:
            case "tear":
                tear(self.folder / "run" / "ledger.jsonl", self._rng)
            case "truncate" | "flip":
                damage(self.folder / "run" / "checkpoints", kind.outside, self._rng)

    def finish(self) -> None:
        """The last step came: what struck was survived, and what was armed and did not strike is for another run."""
        if self._armed is not None:
            self.names.append(self._armed[1])
            self._armed = None
        if self.complete and self._waiting is not None:
            self._waiting.survived = True
            self._waiting.seconds = time.monotonic() - self._struck
            self._waiting = None


def tear(ledger: Path, rng: random.Random) -> None:
    """The journal ends at a random byte of a line, as when the machine stops while it is written."""
    lines = ledger.read_bytes().splitlines(keepends=True)
    half = rng.choice(lines)
    with ledger.open("ab") as file:
        file.write(half[: rng.randrange(1, len(half))].rstrip(b"\n"))


def damage(checkpoints: Path, how: str, rng: random.Random) -> bool:
    """The newest of at least two checkpoints is not what was written."""
    versions = sorted(path for path in checkpoints.glob("version-*") if path.is_dir())
    if len(versions) < 2:
        return False
    victim = rng.choice(sorted(path for path in versions[-1].rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(victim.read_bytes())
    if how == "truncate":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    victim.write_bytes(data)
    return True


def leaked(lives: list[Life], timeout_s: float) -> list[str]:
    """Processes of the lives that are still there after so long; they are ended now."""
    members = [member for life in lives for member in life.members]
    _, alive = psutil.wait_procs(members, timeout=timeout_s)
    found = []
    for process in alive:
        try:
            found.append(f"{process.pid}: {' '.join(process.cmdline())[:120]}")
            process.kill()
        except psutil.NoSuchProcess:
            pass
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
