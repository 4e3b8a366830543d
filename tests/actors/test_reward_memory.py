"""A reward function that takes more memory than it may fails by itself, by name; the next call works."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.recipe.rewards import RewardConfig
from actors.reward import RewardActor
from actors.rewards.functions import check_reward
from algorithms.types import ScoredGroup
from tests.actors.test_reward import group

LIMIT_GB = 0.2
REWARDS = """
kept = []

def _grow(how):
    while how == "grows":
        kept.append(bytes(10_000_000))
    if how == "wants much":
        bytearray(300_000_000)

def sync(completions, how, **kwargs):
    _grow(how[0])
    return [float(len(kept))] * len(completions)

def other(completions, **kwargs):
    return [1.0] * len(completions)

async def awaited(completions, how, **kwargs):
    _grow(how[0])
    return [1.0] * len(completions)

def small(completions, how, **kwargs):
    return [float(sum(bytearray(20_000_000)))] * len(completions)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "reward.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def actors(file: Path) -> Iterator[list[RewardActor]]:
    made = [
        RewardActor(tuple(RewardConfig(function=f"{file}:{name}") for name in names), 20.0, 4, LIMIT_GB)
        for names in (("sync", "other"), ("awaited",), ("small",))
    ]
    yield made
    for actor in made:
        actor.close()


def score(actor: RewardActor, how: str) -> ScoredGroup:
    return asyncio.run(actor.score(group(how=how), ["a", "b"]))


def test_what_takes_too_much_is_unscorable_and_the_next_call_works(actors: list[RewardActor]) -> None:
    sync, awaited, small = actors
    for how in ("grows", "wants much", "grows"):
        scored = score(sync, how)
        assert scored.failures == {"memory": 1}
        assert scored.scores == {"sync": (None, None), "other": (1.0, 1.0)}, "it costs the others nothing"
        assert "reward function sync: memory: " in scored.details[0]
        assert scored.details[0].endswith("MemoryError (rewards.max_memory_gb is 0.2)")
        assert score(sync, "well").scores["sync"] == (0.0, 0.0), "the next process keeps nothing of it"
    assert score(awaited, "wants much").failures == {"memory": 1}
    assert score(awaited, "well").rewards_G == (1.0, 1.0)
    assert score(small, "well").rewards_G == (0.0, 0.0)


def test_what_is_mapped_to_be_written_counts_untouched_and_what_nobody_may_touch_does_not() -> None:
    code = """
import mmap
from actors.rewards.child import _limit_memory

def mapped(access):
    mmap.mmap(-1, 600_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=access)

_limit_memory(400_000_000)
mapped(0)
try:
    mapped(mmap.PROT_READ | mmap.PROT_WRITE)
except OSError as error:
    print(error.strerror)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout == "Cannot allocate memory\n"


def test_without_a_limit_there_is_none(file: Path) -> None:
    actor = RewardActor((RewardConfig(function=f"{file}:sync"),), 20.0)
    try:
        assert score(actor, "wants much").failures == {}
    finally:
        actor.close()


def test_functions_that_cannot_be_loaded_in_so_much_say_so(file: Path) -> None:
    check_reward(f"{file}:sync", max_memory_gb=LIMIT_GB)
    file.write_text("much = bytearray(300_000_000)\n" + REWARDS)
    with pytest.raises(ValueError, match=r"fails: .*MemoryError; raise rewards.max_memory_gb, which is 0.2"):
        check_reward(f"{file}:sync", max_memory_gb=LIMIT_GB)
