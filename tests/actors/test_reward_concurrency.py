"""Of many calls in flight each has its own fate: what one does costs no other its score, and the culprit is named."""

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor
from algorithms.types import ScoredGroup
from tests.actors.test_reward import _alive, _gone_within, group
from tests.prove import ONLY_PROVE

FILE = "tests/actors/concurrent_rewards.py"
LONG_S = 30.0
"""No call takes so long, however busy the machine."""
SHORT_S = 3.0
"""Long enough for a call that does nothing, on a busy machine."""


def actor_of(*names: str, timeout_s: float = LONG_S, width: int = 32) -> RewardActor:
    return RewardActor(tuple(RewardConfig(function=f"{FILE}:{name}") for name in names), timeout_s, width)


def scored_by(actor: RewardActor, *columns: dict[str, object]) -> list[ScoredGroup]:
    """All of these groups, asked for at once."""

    async def all_of_them() -> list[ScoredGroup]:
        return await asyncio.gather(*(actor.score(group(**each), ["a", "b"]) for each in columns))

    return asyncio.run(all_of_them())


def rewards_of(scored: list[ScoredGroup]) -> list[float | None]:
    return [each.rewards_G[0] for each in scored]


def failures_of(scored: list[ScoredGroup]) -> list[dict[str, int]]:
    return [each.failures for each in scored]


@pytest.fixture(scope="module")
def actor() -> Iterator[RewardActor]:
    actor = actor_of("concurrent")
    yield actor
    actor.close()


@pytest.fixture(scope="module")
def hasty() -> Iterator[RewardActor]:
    """Has a short deadline."""
    actor = actor_of("concurrent", timeout_s=SHORT_S)
    yield actor
    actor.close()


GOOD: dict[str, object] = {"how": "good"}


def test_a_hundred_calls_take_as_long_as_the_longest() -> None:
    actor = actor_of("concurrent", width=100)
    try:
        asyncio.run(actor.check())
        started = time.monotonic()
        scored = scored_by(actor, *[{"how": "how many", "wait_s": 2.0}] * 100)
        seconds = time.monotonic() - started
    finally:
        actor.close()
    assert rewards_of(scored)[0] == 100.0, "all had begun before the first ended"
    assert seconds < 20.0, "one after another they take 200 s"


@pytest.mark.parametrize("width", [1, 3])
def test_no_more_are_in_flight_than_it_may_be(width: int) -> None:
    actor = actor_of("concurrent", width=width)
    try:
        scored = scored_by(actor, *[{"how": "how many"}] * 10)
    finally:
        actor.close()
    assert max(filter(None, rewards_of(scored))) == width


def test_answers_come_in_any_order_and_each_to_who_asked(actor: RewardActor) -> None:
    waits = [0.05 * ((7 * place) % 20) for place in range(20)]
    asked = [{"how": "is a float of its own", "own": place, "wait_s": wait} for place, wait in enumerate(waits)]
    assert rewards_of(scored_by(actor, *asked)) == [float(place) for place in range(20)]


def test_megabytes_cross_both_ways_at_once(actor: RewardActor) -> None:
    """More than both pipes hold, while the child is asked for more."""
    scored = scored_by(actor, *[{"how": "a megabyte", "big": "y" * 1_000_000, "wait_s": 0.0}] * 16)
    assert rewards_of(scored) == [1e6] * 16


@pytest.mark.parametrize(("how", "cause"), [("raises", "exception"), ("too few", "bad_output"), ("NaN", "bad_output")])
def test_what_one_gives_is_its_own(actor: RewardActor, how: str, cause: str) -> None:
    scored = scored_by(actor, GOOD, {"how": how}, GOOD)
    assert failures_of(scored) == [{}, {cause: 1}, {}]
    assert rewards_of(scored) == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("how", "cause", "detail"),
    [
        ("os._exit", "died", "exit status 7"),
        ("segfaults", "died", "killed by SIGSEGV"),
        ("is killed", "died", "killed by SIGKILL"),
        ("forks and exits", "died", "exit status 0"),
        ("writes into the pipe", "died", "wrote into the pipe"),
        ("closes descriptors", "died", "exit status 1"),
        ("stops the loop", "exception", "the event loop was stopped"),
        ("leaves a task that exits", "exception", "SystemExit"),
    ],
)
def test_who_ends_the_child_is_named_and_the_others_are_scored(
    actor: RewardActor, how: str, cause: str, detail: str
) -> None:
    scored = scored_by(actor, *[GOOD] * 4, {"how": how}, *[GOOD] * 5)
    assert failures_of(scored) == [{}] * 4 + [{cause: 1}] + [{}] * 5
    assert rewards_of(scored) == [1.0] * 4 + [None] + [1.0] * 5
    assert detail in scored[4].details[0]
    assert failures_of(scored_by(actor, GOOD, GOOD)) == [{}, {}]


def test_several_who_end_the_child_are_named_each(actor: RewardActor) -> None:
    hows = ["good", "os._exit", "good", "segfaults", "good", "good", "os._exit", "good"]
    scored = scored_by(actor, *({"how": how} for how in hows))
    assert failures_of(scored) == [{} if how == "good" else {"died": 1} for how in hows]


def test_when_the_child_is_killed_from_outside_all_are_scored(actor: RewardActor, tmp_path: Path) -> None:
    once = {"how": "is killed once", "flag": str(tmp_path / "flag")}
    scored = scored_by(actor, *[GOOD] * 3, once, GOOD)
    assert failures_of(scored) == [{}] * 5
    assert rewards_of(scored) == [1.0] * 5


def test_one_that_hangs_is_cut_off_and_the_child_lives(hasty: RewardActor) -> None:
    """Nobody is asked again: the process is the same before and after."""
    scored_by(hasty, GOOD)
    before = children()
    scored = scored_by(hasty, GOOD, {"how": "hangs"}, {"how": "good", "wait_s": 1.0})
    assert failures_of(scored) == [{}, {"timeout": 1}, {}]
    assert "took more than 3 s" in scored[1].details[0]
    assert scored_by(hasty, GOOD)[0].failures == {}
    assert children() == before


def test_who_is_late_after_holding_the_process_with_nobody_beside_is_called_once(
    hasty: RewardActor, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    (late,) = scored_by(hasty, {"how": "holds and hangs", "hold_s": 1.0, "calls": str(calls)})
    assert late.failures == {"timeout": 1}
    assert "took more than 3 s" in late.details[0]
    assert calls.read_text() == "called\n"


@pytest.mark.parametrize(
    "how",
    ["hangs in C", pytest.param("loops", marks=ONLY_PROVE), "hangs, and does not let itself be cancelled"],
)
def test_one_that_takes_no_notice_is_killed_and_the_others_are_scored(hasty: RewardActor, how: str) -> None:
    long = {"how": "good", "wait_s": 1.0}
    scored = scored_by(hasty, GOOD, long, {"how": how}, long)
    assert failures_of(scored) == [{}, {}, {"timeout": 1}, {}]
    assert rewards_of(scored) == [1.0, 1.0, None, 1.0]


def test_nobody_is_late_by_what_others_did_before_it_was_begun() -> None:
    """3 s of holding the loop by one; another, of 2 s and with 4 s for it, is asked for in the midst of that."""
    actor = actor_of("concurrent", timeout_s=4.0)

    async def one_after_another() -> list[ScoredGroup]:
        await actor.check()
        holds = asyncio.create_task(actor.score(group(how="holds", hold_s=3.0), ["a", "b"]))
        await asyncio.sleep(0.5)
        return [await actor.score(group(how="good", wait_s=2.0), ["a", "b"]), await holds]

    try:
        assert failures_of(asyncio.run(one_after_another())) == [{}, {}]
    finally:
        actor.close()


def test_who_is_late_because_others_hold_the_process_is_scored_and_fewer_are_called_together() -> None:
    """Six times 1 s of holding the loop, with 3 s for each."""
    actor = actor_of("concurrent", timeout_s=SHORT_S, width=8)
    try:
        scored = scored_by(actor, *[{"how": "holds", "hold_s": 1.0}] * 6)
        assert rewards_of(scored) == [1.0] * 6
        scored += scored_by(actor, GOOD)
    finally:
        actor.close()
    assert failures_of(scored) == [{}] * 7
    told = [note for each in scored for note in each.notes]
    assert told
    assert all("without awaiting" in note for note in told)


def test_nothing_of_a_call_reaches_the_next(actor: RewardActor) -> None:
    hows = ["changes folder", "leaves a timer", "mutates", "forks and returns twice"]
    scored = scored_by(actor, *({"how": how} for how in hows), *[{"how": "good", "wait_s": 1.0}] * 3)
    assert failures_of(scored) == [{}] * 7
    assert rewards_of(scored) == [1.0] * 7


def test_functions_of_one_call_fail_each_for_itself() -> None:
    actor = actor_of("concurrent", "pid", timeout_s=SHORT_S)
    try:
        scored = scored_by(actor, GOOD, {"how": "hangs"}, {"how": "raises"})
    finally:
        actor.close()
    assert failures_of(scored) == [{}, {"timeout": 1}, {"exception": 1}]
    assert len({each.scores["pid"][0] for each in scored}) == 1


def test_sync_functions_are_called_alone_beside_async_ones() -> None:
    """Each kind in a child of its own: a sync one that hangs or dies is no end of an async call."""
    actor = actor_of("sync", "concurrent", "pid", timeout_s=SHORT_S)
    hows = ["good", "sync dies", "how many", "sync hangs", *["how many"] * 8]
    try:
        scored = scored_by(actor, *({"how": how, "wait_s": 1.0} for how in hows))
    finally:
        actor.close()
    of_sync = {"sync dies": (None, None), "sync hangs": (None, None)}
    assert [each.scores["sync"] for each in scored] == [of_sync.get(how, (1.0, 1.0)) for how in hows]
    assert [each.failures for each in scored] == [
        {"sync dies": {"died": 1}, "sync hangs": {"timeout": 1}}.get(how, {}) for how in hows
    ]
    assert len({each.scores["pid"] for each in scored}) == 1, "no async call lost its child"
    assert max(each.scores["concurrent"][0] or 0.0 for each in scored) > 1.0, "they were called together"


def test_judges_are_asked_together() -> None:
    actor = RewardActor((RewardConfig(judge=f"{FILE}:judge"),), LONG_S, 32)
    try:
        asyncio.run(actor.check())
        started = time.monotonic()

        async def many() -> list[ScoredGroup]:
            return await asyncio.gather(*(actor.score(group(), ["short", "longer one"]) for _ in range(32)))

        scored = asyncio.run(many())
        assert time.monotonic() - started < 16.0
    finally:
        actor.close()
    assert Counter(each.rewards_G for each in scored) == {(0.0, 1.0): 32}


def test_close_ends_all_calls_in_flight_and_leaves_no_process() -> None:
    before = set(children())
    actor = actor_of("concurrent", "sync")
    scored_by(actor, GOOD)
    own = set(children()) - before
    assert len(own) == 2

    async def close_soon() -> None:
        calls = [asyncio.create_task(actor.score(group(how="hangs"), ["a", "b"])) for _ in range(40)]
        await asyncio.sleep(0.5)
        started = time.monotonic()
        await asyncio.to_thread(actor.close)
        assert time.monotonic() - started < 10
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert {str(each) for each in ended} == {"the reward actor is closed"}

    asyncio.run(close_soon())
    assert not any(_alive(child) for child in own)
    with pytest.raises(RuntimeError, match="closed"):
        scored_by(actor, GOOD)


@pytest.mark.parametrize("how", ["hangs", "hangs in C"])
def test_the_child_dies_with_its_parent(how: str) -> None:
    code = f"""
import sys
sys.path.insert(0, ".")
from tests.actors.test_reward_concurrency import actor_of, children, scored_by
actor = actor_of("concurrent")
scored_by(actor, {{"how": "good"}})
print(*children(), flush=True)
scored_by(actor, *[{{"how": {how!r}}}] * 3)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    assert _alive(child)
    parent.kill()
    parent.wait(10)
    assert _gone_within(child, 5.0)


def test_a_child_that_died_idle_is_replaced(actor: RewardActor) -> None:
    scored_by(actor, GOOD)
    for child in children():
        psutil.Process(child).kill()
        assert _gone_within(child, 5.0)
    assert failures_of(scored_by(actor, *[GOOD] * 3)) == [{}] * 3


def test_who_waits_no_more_is_not_called() -> None:
    """Its place is taken by the next."""
    actor = actor_of("concurrent", width=1)

    async def some_give_up() -> ScoredGroup:
        await actor.check()
        first = asyncio.create_task(actor.score(group(how="good", wait_s=1.0), ["a", "b"]))
        given_up = [asyncio.create_task(actor.score(group(how="hangs"), ["a", "b"])) for _ in range(5)]
        await asyncio.sleep(0.5)
        for each in given_up:
            each.cancel()
        await first
        return await actor.score(group(how="good"), ["a", "b"])

    started = time.monotonic()
    try:
        assert asyncio.run(some_give_up()).failures == {}
    finally:
        actor.close()
    assert time.monotonic() - started < 2 * LONG_S, "five calls that hang would each have been waited for"


def children() -> list[int]:
    """Of this process, those that run reward functions."""
    found = psutil.Process().children()
    return sorted(child.pid for child in found if "actors.rewards.child" in " ".join(child.cmdline()))
