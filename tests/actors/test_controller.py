"""The controller's two coroutines with light stand-ins for the actors: what is retried, what stops the run, and why."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.controller import Controller, Limits
from actors.errors import ReplicaDeadError, RunError, first_cause
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from algorithms.config import GrpoConfig
from algorithms.pacing import Pacer, Slot
from algorithms.types import Batch, Prompt, Update
from tests.actors.groups import ready

Answer = Callable[[Slot], Any]


class Prompts:
    def prompt(self, ordinal: int) -> Prompt:
        if ordinal == 1000:
            raise ValueError("rows.jsonl: row 7: the prompt is empty")
        return Prompt(ordinal, 0, (1, 2), "", {})


class Replica:
    """Answers a dispatch after a moment; `answer` may raise, or give the oldest version among the tokens."""

    def __init__(self, bench: "Bench", answer: Answer) -> None:
        self.bench = bench
        self.answer = answer
        self.calls: list[tuple[int, int]] = []

    def choose(self) -> int:
        return 0

    def dispatch(self, index: int, prompt: Prompt, attempt: int) -> tuple[Any, Any]:
        self.calls.append((prompt.ordinal, attempt))
        version = self.bench.committed
        return self._sample(Slot(prompt.ordinal, attempt, version)), None

    async def _sample(self, slot: Slot) -> Any:
        await asyncio.sleep(0.001 * (slot.ordinal % 3))
        return ready(slot, self.answer(slot)).summary

    def done(self, index: int) -> None:
        pass


class Bench:
    """Policy, publisher and reporter in one; `events` is the order in which they were called."""

    def __init__(self, folder: Path, answer: Answer | None = None, max_staleness: int = 1, num_steps: int = 4) -> None:
        self.events: list[str] = []
        self.committed = 0
        self.ranks = (None,)
        self.step_error: Exception | None = None
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.replica = Replica(self, answer or (lambda slot: slot.version))
        pacer = Pacer(groups_per_batch=2, max_staleness=max_staleness, num_batches=num_steps)
        stand_in: Any = self
        replica: Any = self.replica
        prompts: Any = Prompts()
        self.controller = Controller(
            num_steps=num_steps,
            max_staleness=max_staleness,
            algorithm=GrpoConfig(),
            max_tokens_per_micro_batch=64,
            limits=Limits(group_timeout_s=5.0, max_attempts=3, max_quarantined=1),
            prompts=prompts,
            pacer=AsyncPacer(pacer, stall_timeout_s=10.0),
            router=replica,
            policy=stand_in,
            publisher=stand_in,
            ledger=self.ledger,
            report=self.report,
        )

    async def step(self, batch: Batch, groups: list[Any]) -> Update:
        self.events.append(f"step {batch.version}")
        if self.step_error is not None:
            raise self.step_error
        return Update(batch.version, batch.version + 1, {})

    async def publish(self, version: int) -> None:
        self.events.append(f"publish {version}")
        self.committed = version

    async def report(self, groups: list[ReadyGroup], batch: Batch, update: Update) -> None:
        self.events.append(f"report {update.version}")

    async def run(self) -> None:
        try:
            await asyncio.wait_for(self.controller.run(), timeout=20.0)
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from None


async def test_each_step_is_published_before_it_is_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path, num_steps=2)
    await bench.run()
    assert bench.events == ["publish 0", "step 0", "publish 1", "report 1", "step 1", "publish 2", "report 2"]
    assert bench.ledger.num_trained == 4
    assert bench.ledger.lost() == set()


async def test_a_failed_group_is_sampled_again_under_its_ordinal(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        if slot.ordinal == 2 and slot.attempt < 2:
            raise RunError("generating a group took longer than 1 s")
        return slot.version

    bench = Bench(tmp_path, answer)
    await bench.run()
    assert [attempt for ordinal, attempt in bench.replica.calls if ordinal == 2] == [0, 1, 2]
    assert bench.ledger.num_redispatched == 2
    assert bench.ledger.num_trained == 8
    assert bench.ledger.num_duplicated == 0
    assert bench.ledger.lost() == set()


async def test_a_hopeless_group_is_set_aside_and_replaced(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        if slot.ordinal == 3:
            raise RunError("the prompt is poison")
        return slot.version

    bench = Bench(tmp_path, answer)
    await bench.run()
    assert bench.ledger.num_quarantined == 1
    assert bench.ledger.num_trained == 8
    assert bench.ledger.lost() == set()


async def test_too_many_hopeless_groups_stop_the_run(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        raise RunError("no reward worker answers")

    with pytest.raises(RunError, match=r"failed 3 times \(replica 0: no reward worker answers\).*max_quarantined"):
        await Bench(tmp_path, answer).run()


async def test_a_dead_engine_stops_the_run_and_is_named(tmp_path: Path) -> None:
    def answer(slot: Slot) -> int:
        raise ReplicaDeadError("the engine of rollout replica 0 died")

    with pytest.raises(RunError, match="rollout replica 0 died while it sampled group"):
        await Bench(tmp_path, answer).run()


async def test_an_error_in_the_step_stops_everything(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.step_error = RunError("the loss of the step at version 0 is nan")
    with pytest.raises(RunError, match="is nan"):
        await bench.run()
    assert bench.events == ["publish 0", "step 0"], "nothing is published of a step that failed"


async def test_a_row_that_cannot_be_a_prompt_stops_the_run_and_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.controller.pacer._pacer._next_ordinal = 1000
    with pytest.raises(RunError, match="row 7"):
        await bench.run()
