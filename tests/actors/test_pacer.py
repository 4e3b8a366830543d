"""The waits around the pacer: order of events, deadlines, and who is said to have waited for what."""

import asyncio
import time
from itertools import pairwise

import pytest

from actors.deadline import DeadlineError
from actors.errors import RunError
from actors.pacer import AsyncPacer
from algorithms.pacing import Pacer
from algorithms.slots import Slot
from tests.actors.groups import ready


async def train(pacer: AsyncPacer, num_steps: int, durations: list[float]) -> list[list[int]]:
    """A whole run with sleeping workers; the ordinals of each batch."""
    batches = []

    async def fill(slot: Slot) -> None:
        await asyncio.sleep(durations[slot.ordinal % len(durations)])
        assert await pacer.finished(slot, ready(slot, slot.version))

    async def produce() -> None:
        async with asyncio.TaskGroup() as fills:
            async for slot in pacer.slots():
                fills.create_task(fill(slot))

    async def learn() -> None:
        await pacer.published(0)
        for step in range(num_steps):
            batches.append([group.slot.ordinal for group in (await pacer.take()).batch])
            await asyncio.sleep(0.005)
            await pacer.published(step + 1)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce())
        tasks.create_task(learn())
    return batches


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_a_run_trains_every_group_once_and_ends(max_staleness: int) -> None:
    pacer = AsyncPacer(Pacer(groups_per_batch=3, max_staleness=max_staleness, num_batches=8), stall_timeout_s=10.0)
    batches = await train(pacer, 8, [0.001, 0.02, 0.004, 0.001, 0.05])
    trained = [ordinal for batch in batches for ordinal in batch]
    assert sorted(trained) == list(range(24))
    assert pacer.num_in_flight == pacer.num_ready == 0
    assert pacer.waits["policy/groups"] > 0
    if max_staleness == 0:
        assert batches == [sorted(batch) for batch in batches]
        assert pacer.waits["dispatch/bound"] > 0
        assert pacer.waits["rollout/idle"] > 0


async def test_a_group_that_never_ends_is_named() -> None:
    pacer = AsyncPacer(Pacer(groups_per_batch=2, max_staleness=0, num_batches=1), stall_timeout_s=0.1)
    await pacer.published(0)
    slots = pacer.slots()
    first, second = await anext(slots), await anext(slots)
    await pacer.finished(first, ready(first, 0))
    with pytest.raises(DeadlineError, match=rf"no group finished .* in flight: {second.ordinal} \(attempt 0\)"):
        await asyncio.wait_for(pacer.take(), timeout=5.0)


async def test_who_is_asked_about_a_stall_may_let_the_run_wait_on_or_end_it() -> None:
    """It waits as long again after each answer, and then asks again."""
    pacer = AsyncPacer(Pacer(groups_per_batch=2, max_staleness=0, num_batches=1), stall_timeout_s=0.1)
    answers: list[RunError | None] = [RunError("the suspect"), None, None]
    asked: list[float] = []

    async def on_stall(reason: str) -> RunError | None:
        assert reason.startswith("no group finished for")
        asked.append(asyncio.get_running_loop().time())
        return answers.pop()

    pacer.on_stall = on_stall
    await pacer.published(0)
    await anext(pacer.slots())
    with pytest.raises(RunError, match="the suspect"):
        await asyncio.wait_for(pacer.take(), timeout=5.0)
    assert len(asked) == 3
    assert all(later - earlier >= 0.09 for earlier, later in pairwise(asked))
    assert pacer.facts()["the policy waits for"] == "groups"


@pytest.mark.parametrize("stops", [False, True])
async def test_what_happens_while_somebody_looks_for_the_suspect_counts(stops: bool) -> None:
    """Looking takes a minute: a group that finishes in it is trained, and who asks the run to stop is heard."""
    pacer = AsyncPacer(Pacer(groups_per_batch=1, max_staleness=0, num_batches=1), stall_timeout_s=0.1)
    await pacer.published(0)
    slot = await anext(pacer.slots())

    async def on_stall(reason: str) -> RunError:
        changing = pacer.stop() if stops else pacer.finished(slot, ready(slot, 0))
        await asyncio.wait_for(changing, timeout=5.0)
        return RunError("the suspect")

    pacer.on_stall = on_stall
    taken = await asyncio.wait_for(pacer.take(), timeout=10.0)
    assert (taken is None) == stops


async def test_the_time_in_which_a_worker_was_started_is_none_in_which_groups_were_late() -> None:
    pacer = AsyncPacer(Pacer(groups_per_batch=1, max_staleness=0, num_batches=1), stall_timeout_s=0.3)
    await pacer.published(0)
    await anext(pacer.slots())
    there_since = 0.0
    pacer.there_since = lambda: there_since
    waiting = asyncio.create_task(pacer.take())
    await asyncio.sleep(0.2)
    there_since = time.monotonic()
    with pytest.raises(DeadlineError, match="no group finished for 0 s"):
        await asyncio.wait_for(waiting, timeout=5.0)
    assert time.monotonic() - there_since >= 0.3, "all of the time was the group's own"


async def test_nothing_is_dispatched_before_the_first_committed_version() -> None:
    pacer = AsyncPacer(Pacer(groups_per_batch=1, max_staleness=0, num_batches=1), stall_timeout_s=5.0)
    slot = asyncio.ensure_future(anext(pacer.slots()))
    await asyncio.sleep(0.02)
    assert not slot.done()
    await pacer.published(0)
    assert (await asyncio.wait_for(slot, 1.0)).version == 0
