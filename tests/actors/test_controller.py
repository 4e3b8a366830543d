"""The controller's two coroutines with light stand-ins for the actors: what is retried, what stops the run, and why."""

import asyncio
import contextlib
import itertools
import json
import random
import re
from collections.abc import Callable, Coroutine, Generator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayTaskError

from actors.attempts import Attempts, Limits
from actors.controller import Controller
from actors.errors import ReplicaDeadError, RollBackError, RunError, StoppedError, first_cause
from actors.fleet import Fleet
from actors.health import Health
from actors.journal import fates, read
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup, TakenGroups
from actors.router import Router
from actors.sampled import Interrupted
from algorithms.budgets import RewardBudget
from algorithms.config import AdaptDepthConfig, FilterConfig, GrpoConfig, StalenessConfig, ZeroStdFilter
from algorithms.costs import SequenceCosts
from algorithms.depth import DepthController
from algorithms.health.config import HealthConfig
from algorithms.pacing import Pacer
from algorithms.slots import Slot
from algorithms.types import Batch, Prompt, Update
from tests.actors.groups import ready
from tests.actors.test_errors import KILLED
from tests.virtual_time import run_virtually

Answer = Callable[[Slot], int | float]
"""The oldest version among the tokens; as a float, after that fraction of a second. May raise."""


class Prompts:
    """A data set of 1000 rows, of which some are bad."""

    def __init__(self) -> None:
        self.bad: set[int] = set()

    def row(self, ordinal: int) -> int:
        return ordinal % 1000

    def prompt(self, ordinal: int) -> Prompt:
        if self.row(ordinal) in self.bad:
            raise ValueError(f"rows.jsonl: row {self.row(ordinal)}: the prompt is empty")
        return Prompt(ordinal, 0, (1, 2), "", {})


class Reference:
    """Ray's, as far as the router knows it: what comes of it, and whether anybody has asked."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._work = asyncio.ensure_future(work)
        self._answer: Future[Any] = Future()
        self._work.add_done_callback(self._arrived)
        self.is_heard = False

    def _arrived(self, work: asyncio.Future[Any]) -> None:
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        self._answer.set_result(work.result()) if error is None else self._answer.set_exception(error)

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self._work).__await__()

    def future(self) -> Future[Any]:
        self.is_heard = True
        return self._answer


class Tokens(str):
    """Stands in for the reference of a group that is somewhere else."""

    is_heard = False

    def future(self) -> None:
        self.is_heard = True


class Replica:
    """Stands in for an actor's handle: answers a call after a moment, or when it is interrupted."""

    def __init__(self, bench: "Bench", answer: Answer) -> None:
        self.bench = bench
        self.answer = answer
        self.calls: list[tuple[int, int, Any]] = []
        self.stops: dict[tuple[int, int], asyncio.Event] = {}
        self.tokens: dict[tuple[int, int], Tokens] = {}
        self.fill = SimpleNamespace(remote=self._fill)
        self.interrupt = SimpleNamespace(remote=self._interrupt)
        self.start = self.close = SimpleNamespace(remote=self._nothing)
        self.ping = SimpleNamespace(remote=self._ping)
        self.pause_s: float | None = None
        self.pings: list[Exception | None] = []
        self.num_calls_at_ping: list[int] = []

    async def _nothing(self) -> None:
        pass

    async def _ping(self) -> None:
        self.num_calls_at_ping.append(len(self.calls))
        error = self.pings.pop(0) if self.pings else None
        if error is not None:
            raise error

    def _fill(self, prompt: Prompt, attempt: int, partial: Any) -> tuple[Any, Any]:
        self.calls.append((prompt.ordinal, attempt, partial))
        slot = Slot(prompt.ordinal, attempt, self.bench.committed)
        self.stops[slot.ordinal, slot.attempt] = asyncio.Event()
        tokens = self.tokens[slot.ordinal, slot.attempt] = Tokens(f"group {prompt.ordinal}.{attempt}")
        return Reference(self._sample(slot)), tokens

    async def _sample(self, slot: Slot) -> Any:
        stop = self.stops[slot.ordinal, slot.attempt]
        pause_s = self.pause_s or self.bench.pauses.get((slot.ordinal, slot.attempt), 0.001 * (slot.ordinal % 3))
        try:
            await asyncio.wait_for(stop.wait(), pause_s)
        except TimeoutError:
            summary = ready(slot, int(self.answer(slot)), self.bench.rewards(slot)).summary
            details = tuple(f"reward function f: {cause}: no" for cause in self.bench.failures)
            return replace(summary, failures=self.bench.failures, details=details)
        return Interrupted(
            ordinal=slot.ordinal, attempt=slot.attempt, replica=0, num_loss_tokens_G=(5, 6),
            oldest_version=slot.version, newest_version=slot.version, generate_s=0.5,
        )  # fmt: skip

    def _interrupt(self, attempts: list[tuple[int, int]] | None) -> Reference:
        for key in list(self.stops) if attempts is None else attempts:
            self.stops[key].set()
        return Reference(self._nothing())


class Bench:
    """Policy, publisher and reporter in one; `events` is the order in which they were called."""

    def __init__(
        self,
        folder: Path,
        answer: Answer | None = None,
        num_steps: int = 4,
        staleness: StalenessConfig = StalenessConfig(),  # noqa: B008
        dynamic_sampling: FilterConfig | None = None,
        depth: DepthController | None = None,
        health: HealthConfig = HealthConfig(),  # noqa: B008
        num_roll_backs: int = 0,
        max_bad_rows: int = 0,
        num_replicas: int = 2,
    ) -> None:
        self.events: list[str] = []
        self.committed = 0
        self.num_teams = 1
        self.costs = SequenceCosts()
        self.max_completion_length = 8
        self.step_error: Exception | None = None
        self.skipped: set[int] = set()
        self.learning_rate_factor = 1.0
        self.metrics: Callable[[int], dict[str, float]] = lambda version: {}
        self.pauses: dict[tuple[int, int], float] = {}
        self.failures: dict[str, int] = {}
        self.batches: list[Batch] = []
        self.rewards: Callable[[Slot], tuple[float | None, float | None]] = lambda slot: (0.0, 1.0)
        folder.mkdir(exist_ok=True)
        self.path = folder / "ledger.jsonl"
        self.ledger = Ledger(self.path)
        for _ in range(num_roll_backs):
            self.ledger.rolled_back("in a process before")
        self.replicas: list[Replica] = []
        self.answer = answer or (lambda slot: slot.version)
        self.answers: dict[int, Answer] = {}  # by replica, where it is another
        self.replica_pauses: dict[int, float] = {}
        pacer = Pacer(
            groups_per_batch=2,
            max_staleness=staleness.max_staleness,
            num_batches=num_steps,
            when_stale=staleness.when_stale,
            over_sampling=staleness.over_sampling,
        )
        self.pacer = AsyncPacer(pacer, stall_timeout_s=10.0)
        stand_in: Any = self
        prompts: Any = Prompts()
        self.prompts: Prompts = prompts
        self.router = Router(max_groups_per_replica=8, num_generations=2, max_completion_length=8)
        self.said: list[str] = []
        self.fleet = Fleet(
            self.spawn, num_replicas, self.router, start_timeout_s=5.0, max_rebuilds=2, say=self.said.append
        )
        self.exclusive = asyncio.Lock()
        self.health = Health(health, self.pacer, stand_in, self.said.append, self.ledger)
        limits = Limits(
            group_timeout_s=5.0, start_timeout_s=1.0, max_attempts=3, max_quarantined=1, max_bad_rows=max_bad_rows
        )
        budget = RewardBudget(max_failed_share=0.1)
        attempts = Attempts(limits, dynamic_sampling, budget, prompts, self.pacer, self.router, self.fleet, self.ledger)
        self.controller = Controller(
            num_steps=num_steps,
            staleness=staleness,
            algorithm=GrpoConfig(),
            max_tokens_per_micro_batch=64,
            pacer=self.pacer,
            attempts=attempts,
            policy=stand_in,
            publisher=stand_in,
            ledger=self.ledger,
            depth=depth,
            report=self.report,
            health=self.health.after,
            settled=self.settled,
            stopped=self.stopped,
        )

    def spawn(self, number: int, bundle: int) -> Any:
        self.replicas.append(Replica(self, self.answers.get(number, self.answer)))
        self.replicas[-1].pause_s = self.replica_pauses.get(number)
        return self.replicas[-1]

    def admitting(self) -> Any:
        return contextlib.nullcontext()

    def resting(self) -> Any:
        return contextlib.nullcontext()

    @property
    def calls(self) -> list[tuple[int, int, Any]]:
        return [call for replica in self.replicas for call in replica.calls]

    def lines(self, event: str) -> list[dict[str, Any]]:
        with self.ledger:
            pass
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    async def step(self, batch: Batch, groups: list[Any]) -> Update:
        self.events.append(f"step {batch.version}")
        self.batches.append(batch)
        if self.step_error is not None:
            raise self.step_error
        skipped = batch.version in self.skipped
        metrics = {"sampling/ess": 0.1, "policy/skipped": float(skipped), "step_time": 1.0}
        metrics |= {"policy/learning_rate_factor": self.learning_rate_factor} | self.metrics(batch.version)
        return Update(batch.version, batch.version + 1, metrics, skipped)

    async def scale_learning_rate(self, factor: float) -> None:
        self.learning_rate_factor *= factor

    async def publish(self, version: int) -> None:
        self.events.append(f"publish {version}")
        self.committed = version
        self.fleet.serve(self.fleet.members)

    async def report(self, groups: list[ReadyGroup], batch: Batch, update: Update) -> Mapping[str, float]:
        self.events.append(f"report {update.version}")
        return update.metrics

    async def settled(self, version: int) -> None:
        self.events.append(f"settled {version}")

    async def stopped(self, version: int) -> int:
        self.events.append(f"stopped {version}")
        return version

    async def run(self) -> None:
        await self.fleet.start()
        try:
            async with self.fleet.supervised():
                await asyncio.wait_for(self.controller.run(), timeout=20.0)
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from None
        assert self.ledger.lost() == set()
        assert self.ledger.num_duplicated == 0


async def test_each_step_is_published_before_it_is_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=2)
    await bench.run()
    steps = (
        f"step {version - 1}, publish {version}, report {version}, settled {version}".split(", ") for version in (1, 2)
    )
    assert bench.events == ["publish 0", *itertools.chain(*steps)]
    assert bench.ledger.num_trained == 4


async def test_a_failed_group_is_sampled_again_under_its_ordinal(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        if slot.ordinal == 2 and slot.attempt < 2:
            raise RunError("generating a group took longer than 1 s")
        return slot.version

    bench = Bench(tmp_path, answer)
    await bench.run()
    assert sorted(attempt for ordinal, attempt, _ in bench.calls if ordinal == 2) == [0, 1, 2]
    assert bench.ledger.num_redispatched == 2
    assert bench.ledger.num_trained == 8


async def test_a_hopeless_group_is_set_aside_and_replaced(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        if slot.ordinal == 3:
            raise RunError("the prompt is poison")
        return slot.version

    bench = Bench(tmp_path, answer)
    await bench.run()
    assert bench.ledger.num_quarantined == 1
    assert bench.ledger.num_trained == 8
    where = {line["attempt"]: line["replica"] for line in bench.lines("dispatched") if line["ordinal"] == 3}
    assert [where[0] == where[1], where[1] == where[2]] == [False, False], "it goes elsewhere after each failure"
    assert bench.fleet.num_rebuilt == 0


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_too_many_hopeless_groups_stop_the_run(tmp_path: Path, num_replicas: int) -> None:
    """What fails on all replicas alike is no replica's fault, and none is built again for it."""

    def answer(slot: Slot) -> int:
        raise RunError("no reward worker answers")

    bench = Bench(tmp_path, answer, num_replicas=num_replicas)
    with pytest.raises(RunError, match=r"failed 3 times \(replica [01]: no reward worker answers\).*max_quarantined"):
        await bench.run()
    assert bench.said == []


async def test_a_replica_on_which_all_fail_is_fenced_and_no_prompt_is_held_responsible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails at once, so it is always the idlest."""
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)

    def broken(slot: Slot) -> int:
        raise RunError("CUBLAS_STATUS_EXECUTION_FAILED")

    bench = Bench(tmp_path, num_steps=20)
    bench.answers[0] = broken
    await bench.run()
    assert bench.fleet.num_rebuilt == 1
    assert "replica 0 is fenced and will be rebuilt: 3 groups that others came through with failed" in bench.said[0]
    assert bench.said[0].endswith("at last for this: CUBLAS_STATUS_EXECUTION_FAILED")
    failed = [line["ordinal"] for line in bench.lines("failed")]
    assert len(failed) == len(set(failed)), "none is sent there twice"
    assert bench.ledger.num_quarantined == 0
    assert bench.ledger.num_trained == 40


def test_a_replica_that_never_finishes_is_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)

    async def run() -> Bench:
        bench = Bench(tmp_path, num_steps=20, staleness=StalenessConfig(max_staleness=2))
        bench.replica_pauses[1] = 3600.0
        await bench.run()
        return bench

    bench = run_virtually(run())
    assert bench.fleet.num_rebuilt == 1
    assert re.search(r"replica 1 is fenced .*: group \d+ took longer than 5 s", bench.said[0])
    assert bench.ledger.num_quarantined == 0
    assert bench.ledger.num_trained == 40


def test_with_one_attempt_allowed_a_prompt_fails_on_both_replicas_before_it_is_set_aside(tmp_path: Path) -> None:
    def poison(slot: Slot) -> int:
        if slot.ordinal == 3:
            raise RunError("the prompt is poison")
        return slot.version

    async def run(num_replicas: int) -> Bench:
        bench = Bench(tmp_path / str(num_replicas), poison, num_replicas=num_replicas)
        bench.controller.attempts.limits = replace(bench.controller.attempts.limits, max_attempts=1)
        await bench.run()
        return bench

    for num_replicas in (1, 2):
        bench = run_virtually(run(num_replicas))
        assert [line["ordinal"] for line in bench.lines("failed")] == [3] * num_replicas
        assert bench.ledger.num_quarantined == 1


@pytest.mark.parametrize("error", [ReplicaDeadError("the engine of rollout replica 0 died"), OutOfMemoryError(KILLED)])
async def test_a_dead_engine_is_rebuilt_and_its_groups_are_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    died: list[int] = []

    def answer(slot: Slot) -> int:
        if slot.ordinal == 2 and not died:
            died.append(slot.ordinal)
            raise error
        return slot.version

    bench = Bench(tmp_path, answer, num_steps=8)
    await bench.run()
    assert bench.fleet.num_rebuilt == 1
    assert len(bench.replicas) == 3
    assert bench.replicas[2].calls, "the new engine serves after the next publication"
    assert "is fenced and will be rebuilt: it died while it sampled group 2" in bench.said[0]
    assert bench.ledger.num_quarantined == 0, "a dead engine is not the prompt's fault"
    assert bench.ledger.num_trained == 16


async def test_a_death_behind_a_replica_is_not_the_replicas(tmp_path: Path) -> None:
    """Ray's error is of its cause's type as well."""

    def answer(slot: Slot) -> int:
        if slot.ordinal == 2 and slot.attempt == 0:
            cause = OutOfMemoryError(KILLED)
            raise RayTaskError("fill", KILLED, cause, "worker", 1, "127.0.0.1").as_instanceof_cause()
        return slot.version

    bench = Bench(tmp_path, answer)
    await bench.run()
    assert bench.fleet.num_rebuilt == 0
    assert [line["ordinal"] for line in bench.lines("failed")] == [2]
    assert bench.ledger.num_trained == 8


def out_of_reach(ordinal: int, times: int) -> Answer:
    """The group's first attempts end with that."""

    def answer(slot: Slot) -> int:
        if slot.ordinal == ordinal and slot.attempt < times:
            raise ActorUnavailableError("the connection was reset", b"0" * 16)
        return slot.version

    return answer


@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_a_replica_that_is_out_of_reach_for_a_moment_is_not_fenced(tmp_path: Path, num_replicas: int) -> None:
    bench = Bench(tmp_path, out_of_reach(2, times=5), num_replicas=num_replicas)
    await bench.run()
    assert bench.said == []
    assert bench.fleet.num_rebuilt == 0
    assert [line["ordinal"] for line in bench.lines("failed")] == [2] * 5, "more often than a group may fail"
    assert bench.ledger.num_quarantined == 0
    assert bench.ledger.num_trained == 8
    stopped = [key for replica in bench.replicas for key, stop in replica.stops.items() if stop.is_set()]
    assert sorted(stopped) == [(2, attempt) for attempt in range(5)], "what may be there still is to end"


async def test_a_replica_whose_connection_breaks_whenever_it_samples_is_fenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it answers every ping; and so the run does not sample for ever and train nothing."""
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    bench = Bench(tmp_path, num_steps=20)

    def breaks(slot: Slot) -> int:
        raise ActorUnavailableError("the connection was reset", b"0" * 16)

    bench.answers[0] = breaks
    await bench.run()
    assert bench.fleet.num_rebuilt == 1
    (fenced,) = [line for line in bench.said if "is fenced" in line]
    assert fenced.endswith("its connection broke 10 times, and no group came through in between")
    assert bench.ledger.num_quarantined == 0
    assert bench.ledger.num_trained == 40


async def test_a_group_that_finds_a_place_when_nobody_needs_it_is_called_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, staleness=StalenessConfig(over_sampling=2.0, when_stale="requeue"))
    attempts, found = bench.controller.attempts, []
    dispatch = attempts.router.dispatch

    async def late(prompt: Prompt, slot: Slot, *rest: Any) -> Any:
        if slot.ordinal in (9, 11, 13, 15):  # the last steps have enough with the others
            while not attempts.pacer.exhausted:  # noqa: ASYNC110  nobody is told
                await asyncio.sleep(0.001)
            found.append((slot.ordinal, slot.attempt))
            bench.pauses[slot.ordinal, slot.attempt] = 3.0
        return await dispatch(prompt, slot, *rest)

    attempts.router.dispatch = late  # type: ignore[method-assign]
    await asyncio.wait_for(bench.run(), 2.0)
    assert found
    stops = {key: stop for replica in bench.replicas for key, stop in replica.stops.items()}
    assert all(stops[key].is_set() for key in found)
    assert bench.ledger.num_trained == 8


async def test_a_group_goes_elsewhere_while_it_is_asked_whether_its_replica_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.deaths._AGAIN_S", 0.05)
    bench = Bench(tmp_path, out_of_reach(0, times=1), num_steps=8)
    away = ActorUnavailableError("the connection was reset", b"0" * 16)
    running = asyncio.create_task(bench.run())
    while not bench.replicas:  # noqa: ASYNC110  nobody is told
        await asyncio.sleep(0)
    bench.replicas[0].pings = [away] * 4
    await running
    assert bench.said == []
    assert [(ordinal, attempt) for ordinal, attempt, _ in bench.replicas[1].calls if ordinal == 0] == [(0, 1)]
    assert len(bench.replicas[1].calls) > 8
    asked = bench.replicas[0].num_calls_at_ping
    assert len(asked) == 5
    assert len(set(asked)) == 1, "nor does any other go there meanwhile"


async def test_a_replica_that_was_out_of_reach_because_it_died_is_fenced_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    monkeypatch.setattr("actors.deaths._AGAIN_S", 0.01)
    bench = Bench(tmp_path, out_of_reach(0, times=1))
    away = ActorUnavailableError("the connection was reset", b"0" * 16)
    running = asyncio.create_task(bench.run())
    while not bench.replicas:  # noqa: ASYNC110  nobody is told
        await asyncio.sleep(0)
    bench.replicas[0].pings = [away, OutOfMemoryError(KILLED)]
    await running
    assert bench.fleet.num_rebuilt == 1
    assert "replica 0 is fenced and will be rebuilt: killed for want of memory on machine 10.0.0.7" in bench.said[0]
    assert bench.ledger.num_quarantined == 0
    assert bench.ledger.num_trained == 8


async def test_engines_that_die_again_and_again_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)

    def answer(slot: Slot) -> int:
        raise ReplicaDeadError("the engine died")

    bench = Bench(tmp_path, answer)
    with pytest.raises(RunError, match=r"rollout replica \d failed .*max_rebuilds allows 2 replacements"):
        await asyncio.gather(bench.run(), serve_what_is_pending(bench))


def test_what_ends_with_its_replica_is_not_held_against_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever error an engine that is being ended has for it."""
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)

    def ended(slot: Slot) -> int:
        raise RunError("the engine is being closed")

    async def run() -> Bench:
        bench = Bench(tmp_path, num_replicas=1)
        bench.controller.attempts.limits = replace(bench.controller.attempts.limits, max_attempts=1)
        bench.answers[0], bench.replica_pauses[0] = ended, 0.2
        running = asyncio.create_task(bench.run())
        await asyncio.sleep(0.1)
        bench.fleet.fence(0, "it gave no sign of life")
        await asyncio.sleep(0.3)  # nobody else serves when its groups end
        serving = asyncio.create_task(serve_what_is_pending(bench))
        await running
        serving.cancel()
        return bench

    bench = run_virtually(run())
    assert bench.lines("failed")
    assert bench.ledger.num_quarantined == 0
    assert bench.ledger.num_trained == 8


@pytest.mark.parametrize("seed", range(12))
def test_whatever_fails_where_every_group_has_one_fate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Replicas that fail now and then, or always, or die, or are out of reach; prompts that nobody comes through."""
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    chance = random.Random(seed)
    poison = {ordinal for ordinal in range(60) if chance.random() < 0.01 * seed}
    away = ActorUnavailableError("the connection was reset", b"0" * 16)
    errors = (RunError("no token came"), away, RayActorError(), OutOfMemoryError(KILLED), ReplicaDeadError("it died"))
    weights = (0.2, 0.1, 0.01, 0.01, 0.01)

    def fails(often: float) -> Answer:
        def answer(slot: Slot) -> int:
            if slot.ordinal in poison:
                raise RunError("the prompt is poison")
            if chance.random() < often:
                raise chance.choices(errors, weights)[0]
            return slot.version

        return answer

    async def run() -> Bench:
        bench = Bench(tmp_path, fails(0.1), num_steps=12, num_replicas=chance.choice((1, 2, 3)))
        limits = replace(bench.controller.attempts.limits, max_quarantined=60)
        bench.controller.attempts.limits, bench.fleet._max_rebuilds = limits, 1000
        bench.answers = {0: fails(chance.choice((0.1, 1.0)))}
        serving = asyncio.create_task(serve_what_is_pending(bench))
        await bench.run()
        serving.cancel()
        return bench

    bench = run_virtually(run())
    assert bench.ledger.num_trained == 24
    assert list(fates(read(bench.path)).problems()) == []


async def serve_what_is_pending(bench: Bench) -> None:
    while True:
        await asyncio.sleep(0.01)
        bench.fleet.serve(bench.fleet.pending)


async def test_an_error_in_the_step_stops_everything(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.step_error = RunError("the loss of the step at version 0 is nan")
    with pytest.raises(RunError, match="is nan"):
        await bench.run()
    assert bench.events == ["publish 0", "step 0"], "nothing is published of a step that failed"


async def test_a_row_that_cannot_be_a_prompt_stops_the_run_and_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.prompts.bad = {7}
    with pytest.raises(RunError, match=r"rows.jsonl: row 7: the prompt is empty; dataset.max_bad_rows allows 0"):
        await bench.run()


async def test_bad_rows_are_set_aside_within_their_budget(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bad_rows=2)
    bench.prompts.bad = {1, 4}
    await bench.run()
    assert bench.ledger.num_trained == 8
    assert [(line["ordinal"], line["row"], line["cause"]) for line in bench.lines("quarantined")] == [
        (1, 1, "rows.jsonl: row 1: the prompt is empty"), (4, 4, "rows.jsonl: row 4: the prompt is empty"),
    ]  # fmt: skip
    assert list(fates(read(bench.path)).problems()) == []


async def test_a_bad_row_counts_once_however_often_it_comes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bad_rows=1)
    bench.pacer._pacer._next_ordinal = 997
    bench.prompts.bad = {998}
    bench.prompts.row = lambda ordinal: 998 if ordinal in (998, 1001) else ordinal  # type: ignore[method-assign]
    await bench.run()
    assert bench.ledger.num_quarantined == 2
    assert bench.ledger.num_bad_rows == 1


async def test_one_bad_row_too_many_stops_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, max_bad_rows=1)
    bench.prompts.bad = {1, 4}
    with pytest.raises(RunError, match=r"row [14]: the prompt is empty; dataset.max_bad_rows allows 1 such rows"):
        await bench.run()


async def test_a_reward_that_always_fails_stops_the_run_and_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=30)
    bench.failures = {"exception": 1}
    with pytest.raises(RunError, match=r"rewards failed in 11 of the last 11 groups \(exception 11\).*function f: "):
        await bench.run()


async def test_a_group_without_any_reward_is_trained_without_advantage(tmp_path: Path) -> None:
    """As in TRL: it takes its place in the batch, moves no baseline, and is counted as unscorable."""
    bench = Bench(tmp_path)
    bench.rewards = lambda slot: (None, None) if slot.ordinal == 2 else (0.0, 1.0)
    await bench.run()
    assert bench.ledger.num_trained == 8
    samples = [sample for batch in bench.batches for rank in batch.ranks for micro in rank for sample in micro.samples]
    assert sum(sample.advantage == 0.0 for sample in samples) == 2


def test_a_straggler_is_requeued_and_counted_as_waste(tmp_path: Path) -> None:
    """And it alone: all others take equally long, and no machine is too busy to wake them in time."""

    async def run() -> Bench:
        bench = Bench(tmp_path, num_steps=6, staleness=StalenessConfig(max_staleness=1, when_stale="requeue"))
        bench.pauses = {(0, 0): 10.0} | {(ordinal, 0): 0.001 for ordinal in range(1, 20)}
        await bench.run()
        return bench

    bench = run_virtually(run())
    assert sorted((attempt, partial) for ordinal, attempt, partial in bench.calls if ordinal == 0) == [
        (0, None), (1, None),
    ]  # fmt: skip
    assert [(line["ordinal"], line["lengths"]) for line in bench.lines("requeued")] == [(0, [5, 6])]
    assert bench.ledger.waste["requeued"].tokens == 11
    assert bench.ledger.num_trained == 12


def test_what_an_interrupted_group_had_sampled_is_left_behind_when_it_is_requeued(tmp_path: Path) -> None:
    """It waits for a replica, and is too late: its next attempt may hold no token of the old weights."""

    async def run() -> Bench:
        bench = Bench(tmp_path, num_steps=8, staleness=StalenessConfig(max_staleness=1, when_stale="requeue"))
        bench.pauses = {(0, 0): 10.0} | {(ordinal, 0): 0.001 for ordinal in range(1, 20)}
        waiting: Any = Tokens("what group 0 had sampled")
        bench.controller.attempts._partial[0] = waiting
        bench.controller.attempts.discard(TakenGroups([], aborted=[Slot(0, 0, 0)], requeued=[], left_out=[]))
        await bench.run()
        return bench

    bench = run_virtually(run())
    assert [partial for ordinal, _, partial in bench.calls if ordinal == 0] == [None, None]


async def test_of_an_attempt_that_fails_both_errors_are_heard(tmp_path: Path) -> None:
    """Ray prints the other one, too, when nobody asks; the tokens of an attempt that comes are none to ask for here."""

    def answer(slot: Slot) -> int:
        if slot.ordinal == 1 and slot.attempt == 0:
            raise RunError("no token came")
        return slot.version

    bench = Bench(tmp_path, answer)
    await bench.run()
    heard = [key for replica in bench.replicas for key, tokens in replica.tokens.items() if tokens.is_heard]
    assert heard == [(1, 0)]


async def test_of_an_attempt_that_is_not_waited_for_both_errors_are_heard(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda slot: 1 / 0)
    bench.pauses = {(ordinal, 0): 0.2 for ordinal in range(9)}
    running = asyncio.create_task(bench.run())
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.wait({running}, timeout=5.0)
    sent = [tokens for replica in bench.replicas for tokens in replica.tokens.values()]
    assert sent
    assert not any(tokens.is_heard for tokens in sent), "their errors have not come yet"
    await asyncio.sleep(0.5)
    assert all(tokens.is_heard for tokens in sent)


async def test_a_replica_that_leaves_hands_its_groups_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    bench = Bench(tmp_path, num_steps=4)
    bench.pauses[0, 0] = bench.pauses[2, 0] = 5.0

    async def leave() -> None:
        await asyncio.sleep(0.05)
        await bench.fleet.leave(0, 0.05, "nobody needs it")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(leave())
        await bench.run()
    assert [replica.number for replica in bench.fleet.members] == [1]
    assert (bench.fleet.num_left, bench.fleet.num_rebuilt) == (1, 0)
    resumed = {(ordinal, attempt): partial for ordinal, attempt, partial in bench.replicas[1].calls if partial}
    assert resumed.keys() & {(0, 1), (2, 1)}, "a group that hung on replica 0 goes on at replica 1"
    assert all(partial == f"group {ordinal}.{attempt - 1}" for (ordinal, attempt), partial in resumed.items())
    assert bench.ledger.num_resumed == len(resumed)
    assert bench.ledger.num_redispatched == 0, "an interruption is not a failure"
    assert bench.ledger.num_trained == 8


async def test_a_replica_that_dies_while_it_leaves_costs_nobody_a_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)

    def answer(slot: Slot) -> float:
        if (slot.ordinal, slot.attempt) == (0, 0):
            raise RayActorError
        return slot.version

    bench = Bench(tmp_path, answer, num_steps=4)
    bench.pauses[0, 0] = 0.2

    async def leave() -> None:
        await asyncio.sleep(0.05)
        await bench.fleet.leave(0, 5.0, "nobody needs it")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(leave())
        await bench.run()
    assert [line["waste"] for line in bench.lines("failed")] == ["preempted"]
    assert bench.ledger.waste["preempted"].attempts == 1
    assert (bench.fleet.num_left, bench.fleet.num_rebuilt) == (1, 0)
    assert bench.ledger.num_trained == 8


async def test_groups_without_signal_are_filtered_and_replaced(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dynamic_sampling=ZeroStdFilter(kind="zero_std"))
    bench.rewards = lambda slot: (1.0, 1.0) if slot.ordinal % 3 == 0 else (0.0, 1.0)
    await bench.run()
    assert bench.ledger.num_trained == 8
    assert {line["ordinal"] for line in bench.lines("filtered")} == {0, 3, 6, 9}
    assert bench.ledger.num_left_out("zero_std") == 4


async def test_a_run_that_only_filters_stops_and_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dynamic_sampling=ZeroStdFilter(kind="zero_std", max_filtered_in_a_row=20))
    bench.rewards = lambda slot: (1.0, 1.0)
    with pytest.raises(RunError, match=r"21 groups in a row were filtered \(zero_std\).*max_filtered_in_a_row"):
        await bench.run()


async def test_over_sampled_groups_that_are_not_needed_have_a_fate(tmp_path: Path) -> None:
    staleness = StalenessConfig(max_staleness=0, over_sampling=2.0, when_stale="requeue")
    bench = Bench(tmp_path, num_steps=3, staleness=staleness)
    bench.pauses |= {(0, 0): 5.0, (3, 0): 5.0}
    await bench.run()
    assert bench.ledger.num_trained == 6
    assert bench.ledger.num_left_out("surplus") > 0


async def test_the_depth_follows_the_measured_sample_size(tmp_path: Path) -> None:
    depth = DepthController(AdaptDepthConfig(), lowest=2, highest=8, depth=8)
    bench = Bench(tmp_path, num_steps=6, staleness=StalenessConfig(max_staleness=3), depth=depth)
    await bench.run()
    assert bench.pacer.pipeline_depth < 8, "an effective sample size of 0.1 is under the band"


async def test_a_run_that_is_asked_to_stop_ends_between_two_steps(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=50)
    before = bench.controller.settled

    async def settled(version: int) -> None:
        await before(version)
        if version == 2:
            await bench.pacer.stop()

    bench.controller.settled = settled
    with pytest.raises(StoppedError, match="stopped after 2 of 50 steps"):
        await bench.run()
    assert bench.events[-2:] == ["settled 2", "stopped 2"]


async def test_a_skipped_step_is_published_and_its_groups_are_not_trained(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=4)
    bench.skipped = {1, 2}
    await bench.run()
    assert bench.committed == 4
    assert bench.ledger.num_trained == 4
    assert bench.ledger.num_left_out("non_finite") == 4
    assert bench.ledger.num_skipped == 2
    assert bench.ledger.waste["non_finite"].tokens == 16
    assert list(fates(read(bench.path)).problems()) == []


async def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=9)
    bench.skipped = {1, 2, 4, 5, 6, 7}
    with pytest.raises(RunError, match=r"last 4 steps, up to version 8, were not finite.*max_skipped_in_a_row"):
        await bench.run()


def health(action: str, **settings: Any) -> HealthConfig:
    """One rule, which finds an entropy of 0 in the last two steps."""
    return HealthConfig.model_validate({"rules": [{"kind": "entropy", "window": 2, "action": action}], **settings})


def collapsed(since: int) -> Callable[[int], dict[str, float]]:
    return lambda version: {"entropy": 0.001 if version >= since else 1.0}


async def test_a_warning_is_said_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=8, health=health("warn"))
    bench.metrics = collapsed(2)
    await bench.run()
    assert len(bench.said) == 1
    assert bench.said[0].startswith("warning: entropy was 0.001 nats a token over the last 2 steps, under 0.02")


async def test_a_pause_stops_in_order_and_says_why(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=8, health=health("pause"))
    bench.metrics = collapsed(2)
    with pytest.raises(StoppedError, match=r"stopped after 4 of 8 steps: entropy was .*; the same command goes on"):
        await bench.run()
    assert bench.events[-2:] == ["settled 4", "stopped 4"]


async def test_the_learning_rate_is_lowered_as_often_as_allowed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=12, health=health("lower_learning_rate", max_lowerings=2))
    bench.metrics = collapsed(0)
    await bench.run()
    assert bench.learning_rate_factor == 0.25
    assert "entropy lowers the learning rate to 0.5 of its schedule" in bench.said[0]
    assert "entropy lowers the learning rate to 0.25 of its schedule" in bench.said[1]
    assert "as often as health.max_lowerings allows (2)" in bench.said[2]


async def test_lowerings_before_a_resumption_count(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=4, health=health("lower_learning_rate", max_lowerings=2))
    bench.metrics = collapsed(0)
    bench.learning_rate_factor = 0.25
    await bench.run()
    assert bench.learning_rate_factor == 0.25


async def test_a_roll_back_is_asked_for_within_its_budget(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=8, health=health("roll_back"))
    bench.metrics = collapsed(2)
    with pytest.raises(RollBackError, match=r"entropy was .*goes back to the last good checkpoint, 1 of 1 times"):
        await bench.run()
    assert bench.events[-1] == "report 4", "nothing is cut of the step that went wrong"
    assert fates(read(bench.path)).num_roll_backs == 1, "it is on the disk, whatever becomes of this process"
    again = Bench(tmp_path / "again", num_steps=8, health=health("roll_back"), num_roll_backs=1)
    again.metrics = collapsed(2)
    with pytest.raises(RunError, match=r"gone back 1 times already, and health.max_roll_backs allows 1") as caught:
        await again.run()
    assert not isinstance(caught.value, RollBackError)


async def test_no_cut_is_good_from_the_first_step_that_looks_wrong_to_a_rule_that_goes_back(tmp_path: Path) -> None:
    for action, expected in (("roll_back", [True, True, False]), ("warn", [True, True, True])):
        bench = Bench(tmp_path / action, num_steps=3, health=health(action))
        bench.metrics = collapsed(2)
        seen: list[bool] = []

        async def settled(version: int, bench: Bench = bench, seen: list[bool] = seen) -> None:
            seen.append(bench.health.healthy())

        bench.controller.settled = settled
        await bench.run()
        assert seen == expected


async def test_no_cut_is_good_while_steps_are_skipped(tmp_path: Path) -> None:
    """The weights have not moved, and may be why the loss is not finite."""
    bench = Bench(tmp_path, num_steps=4)
    bench.skipped = {1, 2}
    seen: list[bool] = []

    async def settled(version: int) -> None:
        seen.append(bench.health.healthy())

    bench.controller.settled = settled
    await bench.run()
    assert seen == [True, False, False, True]


async def test_skipped_steps_tell_the_rules_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=3, health=health("pause"))
    bench.metrics = collapsed(0)
    bench.skipped = {1, 2}
    await bench.run()
