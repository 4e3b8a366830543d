"""The controller's two coroutines with light stand-ins for the actors: what is retried, what stops the run, and why."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.attempts import Attempts, Limits
from actors.controller import Controller
from actors.errors import ReplicaDeadError, RunError, StoppedError, first_cause
from actors.fleet import Fleet
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.rollout import Interrupted
from actors.router import Router
from algorithms.config import AdaptDepthConfig, FilterConfig, GrpoConfig, StalenessConfig, ZeroStdFilter
from algorithms.depth import DepthController
from algorithms.pacing import Pacer
from algorithms.slots import Slot
from algorithms.types import Batch, Prompt, Update
from tests.actors.groups import ready

Answer = Callable[[Slot], int | float]
"""The oldest version among the tokens; as a float, after that fraction of a second. May raise."""


class Prompts:
    def prompt(self, ordinal: int) -> Prompt:
        if ordinal == 1000:
            raise ValueError("rows.jsonl: row 7: the prompt is empty")
        return Prompt(ordinal, 0, (1, 2), "", {})


class Replica:
    """Stands in for an actor's handle: answers a call after a moment, or when it is interrupted."""

    def __init__(self, bench: "Bench", answer: Answer) -> None:
        self.bench = bench
        self.answer = answer
        self.calls: list[tuple[int, int, Any]] = []
        self.stops: dict[tuple[int, int], asyncio.Event] = {}
        self.fill = SimpleNamespace(remote=self._fill)
        self.interrupt = SimpleNamespace(remote=self._interrupt)
        self.start = self.close = SimpleNamespace(remote=self._nothing)

    async def _nothing(self) -> None:
        pass

    def _fill(self, prompt: Prompt, attempt: int, partial: Any) -> tuple[Any, Any]:
        self.calls.append((prompt.ordinal, attempt, partial))
        slot = Slot(prompt.ordinal, attempt, self.bench.committed)
        return asyncio.ensure_future(self._sample(slot)), f"group {prompt.ordinal}.{attempt}"

    async def _sample(self, slot: Slot) -> Any:
        stop = self.stops[slot.ordinal, slot.attempt] = asyncio.Event()
        pause_s = self.bench.pauses.get((slot.ordinal, slot.attempt), 0.001 * (slot.ordinal % 3))
        try:
            await asyncio.wait_for(stop.wait(), pause_s)
        except TimeoutError:
            return ready(slot, int(self.answer(slot)), self.bench.rewards(slot)).summary
        return Interrupted(
            ordinal=slot.ordinal, attempt=slot.attempt, replica=0, num_loss_tokens_G=(5, 6),
            oldest_version=slot.version, newest_version=slot.version, generate_s=0.5,
        )  # fmt: skip

    def _interrupt(self, attempts: list[tuple[int, int]] | None) -> None:
        for key in list(self.stops) if attempts is None else attempts:
            self.stops[key].set()


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
    ) -> None:
        self.events: list[str] = []
        self.committed = 0
        self.ranks = (None,)
        self.step_error: Exception | None = None
        self.pauses: dict[tuple[int, int], float] = {}
        self.rewards: Callable[[Slot], tuple[float, float]] = lambda slot: (0.0, 1.0)
        self.path = folder / "ledger.jsonl"
        self.ledger = Ledger(self.path)
        self.replicas: list[Replica] = []
        self.answer = answer or (lambda slot: slot.version)
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
        self.router = Router(max_groups_per_replica=8, num_generations=2, max_completion_length=8)
        self.said: list[str] = []
        self.fleet = Fleet(self.spawn, 2, self.router, start_timeout_s=5.0, max_rebuilds=2, say=self.said.append)
        self.exclusive = asyncio.Lock()
        limits = Limits(group_timeout_s=5.0, max_attempts=3, max_quarantined=1)
        self.controller = Controller(
            num_steps=num_steps,
            staleness=staleness,
            algorithm=GrpoConfig(),
            max_tokens_per_micro_batch=64,
            pacer=self.pacer,
            attempts=Attempts(limits, dynamic_sampling, prompts, self.pacer, self.router, self.fleet, self.ledger),
            policy=stand_in,
            publisher=stand_in,
            ledger=self.ledger,
            depth=depth,
            report=self.report,
            settled=self.settled,
            stopped=self.stopped,
        )

    def spawn(self, number: int, bundle: int) -> Any:
        self.replicas.append(Replica(self, self.answer))
        return self.replicas[-1]

    def admitting(self) -> Any:
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
        if self.step_error is not None:
            raise self.step_error
        return Update(batch.version, batch.version + 1, {"sampling/ess": 0.1})

    async def publish(self, version: int) -> None:
        self.events.append(f"publish {version}")
        self.committed = version
        self.fleet.serve(self.fleet.members)

    async def report(self, groups: list[ReadyGroup], batch: Batch, update: Update) -> None:
        self.events.append(f"report {update.version}")

    async def settled(self, version: int) -> None:
        self.events.append(f"settled {version}")

    async def stopped(self, version: int) -> None:
        self.events.append(f"stopped {version}")

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


async def test_too_many_hopeless_groups_stop_the_run(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        raise RunError("no reward worker answers")

    with pytest.raises(RunError, match=r"failed 3 times \(replica [01]: no reward worker answers\).*max_quarantined"):
        await Bench(tmp_path, answer).run()


async def test_a_dead_engine_is_rebuilt_and_its_groups_are_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)
    died: list[int] = []

    def answer(slot: Slot) -> int:
        if slot.ordinal == 2 and not died:
            died.append(slot.ordinal)
            raise ReplicaDeadError("the engine of rollout replica 0 died")
        return slot.version

    bench = Bench(tmp_path, answer, num_steps=8)
    await bench.run()
    assert bench.fleet.num_rebuilt == 1
    assert len(bench.replicas) == 3
    assert bench.replicas[2].calls, "the new engine serves after the next publication"
    assert "is fenced and will be rebuilt: it died while it sampled group 2" in bench.said[0]
    assert bench.ledger.num_quarantined == 0, "a dead engine is not the prompt's fault"
    assert bench.ledger.num_trained == 16


async def test_engines_that_die_again_and_again_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.fleet.ray.kill", lambda handle: None)

    def answer(slot: Slot) -> int:
        raise ReplicaDeadError("the engine died")

    bench = Bench(tmp_path, answer)
    with pytest.raises(RunError, match=r"rollout replica \d failed .*max_rebuilds allows 2 replacements"):
        await asyncio.gather(bench.run(), serve_what_is_pending(bench))


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
    bench.pacer._pacer._next_ordinal = 1000
    with pytest.raises(RunError, match="row 7"):
        await bench.run()


async def test_a_straggler_is_requeued_and_counted_as_waste(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=6, staleness=StalenessConfig(max_staleness=1, when_stale="requeue"))
    bench.pauses[0, 0] = 10.0
    await bench.run()
    assert sorted((attempt, partial) for ordinal, attempt, partial in bench.calls if ordinal == 0) == [
        (0, None), (1, None),
    ]  # fmt: skip
    assert [line["lengths"] for line in bench.lines("requeued")] == [[5, 6]]
    assert bench.ledger.waste["requeued"].tokens == 11
    assert bench.ledger.num_trained == 12


async def test_a_drained_replica_hands_its_groups_over(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=4)
    bench.pauses[0, 0] = bench.pauses[2, 0] = 5.0
    asyncio.get_running_loop().call_later(0.05, bench.router.drain, 0)
    await bench.run()
    resumed = {(ordinal, attempt): partial for ordinal, attempt, partial in bench.replicas[1].calls if partial}
    assert resumed.keys() & {(0, 1), (2, 1)}, "a group that hung on replica 0 goes on at replica 1"
    assert all(partial == f"group {ordinal}.{attempt - 1}" for (ordinal, attempt), partial in resumed.items())
    assert bench.ledger.num_resumed == len(resumed)
    assert bench.ledger.num_redispatched == 0, "an interruption is not a failure"
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
