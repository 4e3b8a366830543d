"""A run that goes on counts on: what had gone wrong, what was measured, and how deep the pipeline had become."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from actors.attempts import Attempts, Limits
from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.moment import GrpoMoment
from actors.errors import RunError
from actors.ledger import Ledger
from actors.pacer import AsyncPacer
from algorithms.budgets import RewardBudget
from algorithms.config import AdaptDepthConfig
from algorithms.depth import DepthController
from algorithms.pacing import Pacer


def make(folder: Path) -> GrpoMoment:
    """Of a run with one replica, which is not there; a group may fail three times."""
    router: Any = SimpleNamespace(serves_besides=lambda replicas: False)
    fleet: Any = SimpleNamespace(is_fenced=lambda number: False)
    rows: Any = SimpleNamespace(row=str)
    pacer = AsyncPacer(Pacer(groups_per_batch=2, max_staleness=4, num_batches=9), stall_timeout_s=5.0)
    ledger = Ledger(folder / "ledger.jsonl")
    limits = Limits(group_timeout_s=5.0, start_timeout_s=1.0, max_attempts=3, max_quarantined=1, max_bad_rows=0)
    attempts = Attempts(limits, None, RewardBudget(1.0), rows, pacer, router, fleet, ledger)
    depth = DepthController(AdaptDepthConfig(smoothing=0.0), 2, pacer.pipeline_depth, pacer.pipeline_depth)
    return GrpoMoment(pacer, ledger, attempts, depth, Progress, num_rows=7)


async def fail(moment: GrpoMoment) -> int:
    """Dispatch the first group that may be, and let it fail."""
    await moment.pacer.published(0)
    slot = await anext(moment.pacer.slots())
    moment.ledger.dispatched(slot, 0)
    await moment.attempts._failed(slot, 0, RunError("no answer"))
    return slot.ordinal


async def test_a_run_that_goes_on_counts_on(tmp_path: Path) -> None:
    first = make(tmp_path)
    assert [await fail(first) for _ in range(2)] == [0, 0]
    first.ledger.audit.trained([3, 5], [0.5, 1.0])
    assert first.depth is not None
    depth = first.depth.update(0.0, None)
    cut, ready = first.take(0)
    cut.write(tmp_path, [])
    assert ready == []

    second = make(tmp_path)
    read, _ = Cut.read(tmp_path)
    assert read.num_rows == 7
    second.pacer.restore(read.pacer, [])
    await second.restore(read)
    assert second.depth is not None
    assert second.depth.depth == second.pacer.pipeline_depth == depth < first.pacer.pipeline_depth
    assert second.ledger.audit.report() == first.ledger.audit.report()
    assert await fail(second) == 0
    assert second.ledger.num_quarantined == 1, "its third failure in all"
