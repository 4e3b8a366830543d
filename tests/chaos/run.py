"""One chaos run: as many lives of the same command as the faults need, until the last step is taken."""

import math
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.belongings import left_behind
from tests.chaos.disk import checkpoints_of, damage, last_metric, tear
from tests.chaos.faults import arm, disarm, has_fired, prepare, set_pace
from tests.chaos.life import Journal, Life
from tests.chaos.plan import CLASSES, Inside, Kind, Scene, choose
from tests.chaos.recipe import write_recipe

GROUPS_PER_BATCH = 4
HANG_S = {"light": 60.0, "vllm": 180.0}
"""Nothing new in the journal for so long is a hang; a real engine alone takes half of it to start."""
START_S = {"light": 120.0, "vllm": 400.0}
"""The same before the first line of a life."""
MOST_IN_FLIGHT = {"light": 6, "vllm": 3}
"""Faults that are armed, or not survived yet, at one time."""
_POLL_S = 0.05
_PATIENCE_S = 20.0
"""A fault whose point is not come to for so long is taken back, and comes again later."""
_MAX_LIVES_IN_VAIN = 4
_LEAST_DISK = 8192
"""A disk that is full of less has no room for the driver's last words, either."""
_LAST_STEPS = 3
_PACE_S = 0.15
_SLOW_S = 1.0
"""What a step takes while faults are to strike, and when there are few steps left for them."""


@dataclass(slots=True)
class Outcome:
    """What became of one fault."""

    name: str
    seconds: float = 0.0
    """Until a further step was trained; less than the time that a replacement takes, where others go on."""
    survived: bool = False


@dataclass(frozen=True, slots=True)
class Armed:
    """A fault that strikes when some process comes to its point."""

    name: str
    files: tuple[str, ...]
    """The fault's own, and then its trigger's."""
    since: float


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault until a step is trained after it."""

    outcome: Outcome
    at: float
    trained: int
    """Groups that had been trained."""


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
    colocated: bool = False
    """The replicas lie with the policy."""
    outcomes: list[Outcome] = field(default_factory=list)
    hangs: int = 0
    untyped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    complete: bool = False
    _rng: random.Random = field(default_factory=random.Random)
    _armed: list[Armed] = field(default_factory=list)
    _struck: list[Struck] = field(default_factory=list)
    _num_replicas: int = 0
    _progress: float = 0.0
    _trained_before: int = 0
    """Groups that earlier lives have trained."""
    _cost_checkpoint: float = 0.0
    """When a fault last cost a checkpoint (time.time())."""
    _pace_s: float | None = None
    _number: int = 0
    _vain: int = 0

    @property
    def faults(self) -> Path:
        return self.folder / "faults"

    def drive(self) -> None:
        """Until the run is complete, or does not come any further."""
        self._rng.seed(self.seed)
        self._num_replicas = 2 if self.engine == "vllm" else 3
        recipe = write_recipe(
            self.folder,
            steps=self.steps,
            seed=self.seed,
            max_staleness=self._rng.choice((0, 1, 1, 2)),
            when_stale=self._rng.choice(("pace", "pace", "requeue")),
            over_sampling=self._rng.choice((1.0, 1.0, 1.5)),
            num_bad_rows=self._rng.choice((0, 1)),
            num_replicas=self._num_replicas,
            num_ranks=self._rng.choice((1, 1, 2)),
            num_rewards=self._rng.choice((1, 1, 2)),
            engine=self.engine,
            colocated=self.colocated,
        )
        prepare(self.faults)
        journal = Journal(self.folder / "run" / "ledger.jsonl")
        try:
            while not self.complete and self._vain < _MAX_LIVES_IN_VAIN:
                self._trained_before = journal.trained
                self._live(recipe, journal)
                self._vain = 0 if journal.trained > self._trained_before else self._vain + 1
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
        """Go on with the faults: note what has struck and what is survived, and let the next one strike."""
        self._settle(journal)
        for armed in [*self._armed]:
            if has_fired(self.faults, armed.files[0]):
                self._armed.remove(armed)
                self._strike(armed.name, journal)
                if CLASSES[armed.name].outside == "kill writing":
                    life.kill()
                    return
            elif time.monotonic() - armed.since > _PATIENCE_S:
                self._take_back(armed)
        if time.monotonic() > self.deadline:
            self.names.clear()
        self._set_pace(journal)
        busy = len(self._armed) + len(self._struck) >= MOST_IN_FLIGHT[self.engine]
        if journal.trained < GROUPS_PER_BATCH or busy or not self.names:
            return
        place = choose(self.names, self._scene(journal))
        if place is not None:
            self._begin(self.names.pop(place), life, journal)

    def _begin(self, name: str, life: Life, journal: Journal) -> None:
        kind = CLASSES[name]
        inside = ("policy", "midwrite", "slow") if kind.outside == "kill writing" else kind.inside
        if inside is not None:
            points = (inside,) if kind.trigger is None else (inside, kind.trigger)
            files = tuple(self._file(point) for point in points)
            for file in files:
                arm(self.faults, file)
            self._armed.append(Armed(name, files, time.monotonic()))
            return
        time.sleep(self._rng.random())  # a random moment
        if life.exit_code is None:
            if self._outside(kind, life):
                self._strike(name, journal)
            else:
                self.names.append(name)
        else:
            self.names.insert(0, name)

    def _file(self, point: Inside) -> str:
        self._number += 1
        return ".".join((*point, f"{self._number:04d}"))

    def _take_back(self, armed: Armed) -> None:
        for file in armed.files:
            disarm(self.faults, file)
        if not has_fired(self.faults, armed.files[0]):  # in this moment
            self._armed.remove(armed)
            self.names.append(armed.name)

    def _scene(self, journal: Journal) -> Scene:
        """What the next fault is chosen by."""
        written = checkpoints_of(self.folder / "run")
        return Scene(
            in_flight=[armed.name for armed in self._armed] + [struck.outcome.name for struck in self._struck],
            most_in_flight=MOST_IN_FLIGHT[self.engine],
            has_trained=journal.trained >= self._trained_before + GROUPS_PER_BATCH,
            all_serve=last_metric(self.folder / "run" / "metrics.jsonl", "sync/replicas") == self._num_replicas,
            num_checkpoints=len(written),
            newest_is_new=max(written, default=0.0) > self._cost_checkpoint,
            is_late=journal.version >= self.steps - _LAST_STEPS,
        )

    def _set_pace(self, journal: Journal) -> None:
        """As many steps as there are shall do for all the faults, and no more be waited for than are needed."""
        if not (self.names or self._armed or self._struck):
            pace_s = 0.0
        else:
            left = self.steps - journal.version
            pace_s = _PACE_S if left > 3 * (len(self.names) + len(self._armed)) + 10 else _SLOW_S
        if pace_s != self._pace_s:
            self._pace_s = pace_s
            set_pace(self.faults, pace_s)

    def _strike(self, name: str, journal: Journal) -> None:
        journal.look()
        if CLASSES[name].costs_checkpoint:
            self._cost_checkpoint = time.time()
        outcome = Outcome(name)
        self.outcomes.append(outcome)
        self._struck.append(Struck(outcome, time.monotonic(), journal.trained))
        self.tick(name)

    def _settle(self, journal: Journal) -> None:
        """A fault is survived when the run has trained another whole step."""
        for struck in [*self._struck]:
            if journal.trained >= struck.trained + GROUPS_PER_BATCH:
                self._survive(struck)

    def _survive(self, struck: Struck) -> None:
        struck.outcome.survived = True
        struck.outcome.seconds = time.monotonic() - struck.at
        self._struck.remove(struck)

    def _outside(self, kind: Kind, life: Life) -> bool:
        """Whether there was something to strike."""
        match kind.outside:
            case "term":
                life.terminate()
            case "full":
                size = (self.folder / "run" / "ledger.jsonl").stat().st_size
                return size >= _LEAST_DISK and life.fill_disk(size)
            case "raylet":
                raylet = life.raylet()
                if raylet is None:
                    return False
                raylet.send_signal(signal.SIGKILL)
            case _:
                life.kill()
        match kind.outside:
            case "tear":
                tear(self.folder / "run" / "ledger.jsonl", self._rng)
            case "truncate" | "flip":
                return damage(self.folder / "run" / "checkpoints", kind.outside, self._rng)
        return True

    def finish(self) -> None:
        """The last step came: what struck was survived, and what was armed and did not strike is for another run."""
        self.names += [armed.name for armed in self._armed]
        self._armed.clear()
        if self.complete:
            for struck in [*self._struck]:
                self._survive(struck)

    def leaked(self, timeout_s: float) -> list[str]:
        """What all the lives have left behind after so long."""
        members = {member for life in self.lives for member in life.members}
        shared = {name for life in self.lives for name in life.shared}
        return left_behind(self.faults, members, shared, timeout_s)
