"""A cut that cannot be written is told and does not end the run; the last one must be."""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.checkpoint.checkpointer import Checkpointer
from actors.checkpoint.config import BestConfig, CheckpointConfig
from actors.checkpoint.cut import Cut, Progress
from actors.checkpoint.store import CheckpointStore
from actors.deadline import DeadlineError
from actors.errors import RunError, SpoiledError
from actors.model.tiny import byte_tokenizer
from actors.pacer import ReadyGroup
from actors.turns import Turns
from algorithms.slots import PacerState


class StandIn:
    """A policy whose files are one; `write` may fail."""

    def __init__(self) -> None:
        self.write: Callable[[Path], object] = lambda folder: (folder / "weights").write_bytes(b"w")
        self.num_snapshots = 0
        self.healthy = True
        self.version = 0

    async def snapshot(self) -> None:
        self.num_snapshots += 1

    async def write_snapshot(self, folder: Path, timeout_s: float) -> None:
        await asyncio.sleep(0)
        self.write(folder)


def cut_of(version: int) -> tuple[Cut, list[ReadyGroup]]:
    return Cut(version, 0, PacerState(version, 9 - version, 2 * version, (), ()), Progress()), []


def make(
    folder: Path, every: int = 2, rewards: Mapping[int, float] | None = None, **best: Any
) -> tuple[Checkpointer, StandIn, list[str]]:
    policy: Any = StandIn()
    said: list[str] = []
    config = CheckpointConfig(every=every, timeout_s=5.0, best=BestConfig(**best) if best else None)
    checkpointer = Checkpointer(
        store=CheckpointStore(folder / "checkpoints", config.keep, config.best),
        config=config,
        num_steps=9,
        policy=policy,
        tokenizer=byte_tokenizer(64),
        moment=cut_of,
        metrics=lambda: {"loss": 1.0} | ({} if rewards is None else {"reward": rewards.get(policy.version, math.nan)}),
        say=said.append,
        healthy=lambda: policy.healthy,
    )
    return checkpointer, policy, said


async def test_cuts_are_taken_when_due(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    for version in range(1, 6):
        await checkpointer.after(version)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [2, 4]
    assert (policy.num_snapshots, said) == (2, [])


async def test_the_critic_is_part_of_the_cut_or_there_is_none(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    critic: Any = StandIn()
    checkpointer.critic = critic
    await checkpointer.after(2)
    await checkpointer.finish()
    assert (policy.num_snapshots, critic.num_snapshots) == (1, 1)
    folder = checkpointer.store.open(2)
    assert (folder / "weights").exists()
    assert (folder / "critic" / "weights").exists()
    assert (folder / "critic" / "model" / "tokenizer.json").exists(), "a model that others load as it is"

    critic.write = lambda folder: (_ for _ in ()).throw(SpoiledError("score.weight of the critic is not finite"))
    await checkpointer.after(4)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [2], "half a cut is none"
    assert "score.weight of the critic is not finite" in said[0]


async def test_a_cut_that_is_due_waits_until_all_is_well(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path, every=3)
    for version in range(1, 8):
        policy.healthy = version not in (3, 4)
        await checkpointer.after(version)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [5, 6]


async def test_a_cut_waits_while_an_engine_is_built_on_the_policys_gpus_unless_it_is_the_last(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path, every=3)
    turns = checkpointer.turns = Turns()
    snapshot = policy.snapshot

    async def alone() -> None:
        await snapshot()
        building = asyncio.create_task(built(turns))
        await asyncio.sleep(0)
        assert policy.version == 7 or not turns.num_building
        building.cancel()

    policy.snapshot = alone
    for version in range(1, 6):
        async with turns.building() if version in (3, 4) else contextlib.nullcontext():
            await checkpointer.after(version)
    policy.version = 7
    async with turns.building():
        assert await checkpointer.last(7) == 7
    assert checkpointer.store.versions() == [5, 7]


async def built(turns: Turns) -> None:
    async with turns.building():
        await asyncio.sleep(0)


async def test_one_that_fails_is_told_and_the_next_is_written(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    good, policy.write = policy.write, lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    await checkpointer.after(2)
    await checkpointer.finish()
    assert checkpointer.store.versions() == []
    assert "the checkpoint of version 2 could not be written" in said[0]
    assert "No space left" in said[0]
    policy.write = good
    await checkpointer.after(4)
    await checkpointer.finish()
    assert checkpointer.store.versions() == [4]


async def test_what_cannot_be_removed_is_told_and_undoes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, policy, said = make(tmp_path)
    monkeypatch.setattr("actors.checkpoint.store.shutil.rmtree", lambda path, ignore_errors: None)  # as on NFS
    await run_to(checkpointer, policy, 1, 8)
    assert checkpointer.store.versions() == [6, 8]
    (first, second) = said
    assert ".staged-gone-" in first
    assert "(1 such in all), and the disk fills" in first
    assert "(2 such in all)" in second


async def test_the_last_one_is_on_the_disk_or_it_is_an_error(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path)
    await checkpointer.last(3)
    assert checkpointer.store.versions() == [3]
    policy.write = lambda folder: (_ for _ in ()).throw(OSError("broken"))
    with pytest.raises(RunError, match="version 5 could not be written: broken"):
        await checkpointer.last(5)


async def test_the_last_one_is_left_out_when_it_is_none_to_go_back_to(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    await checkpointer.after(2)
    policy.healthy = False
    assert await checkpointer.last(3) == 2
    assert checkpointer.store.versions() == [2], "what was being written is on the disk, and stays the newest"
    assert policy.num_snapshots == 1
    assert len(said) == 1
    assert "no checkpoint of version 3 is left (a rule of health" in said[0]
    assert said[0].endswith("that of 2 is kept")


async def test_a_run_that_stops_in_a_bad_state_before_its_first_cut_says_that_it_begins_anew(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    policy.healthy = False
    assert await checkpointer.last(1) is None
    assert "the same command begins anew" in said[0]


def spoil(folder: Path) -> None:
    raise SpoiledError("lm_head.weight of the policy is not finite")


async def test_weights_that_are_not_finite_never_become_the_newest_cut(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    await checkpointer.after(2)
    await checkpointer.finish()
    policy.write = spoil
    await checkpointer.after(4)
    assert await checkpointer.last(4) == 2, "it was being written already"
    assert await checkpointer.last(5) == 2
    assert checkpointer.store.versions() == [2]
    assert [line.partition(" (lm_head.weight of the policy is not finite); ") for line in said] == [
        (f"warning: no checkpoint of version {version} is left", " (lm_head.weight of the policy is not finite); ",
         "that of 2 is kept") for version in (4, 5)
    ]  # fmt: skip


async def test_whoever_stops_at_a_version_whose_cut_failed_tries_once_more(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path)
    good, policy.write = policy.write, lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    await checkpointer.after(2)
    await checkpointer.finish()
    policy.write = good
    assert await checkpointer.last(2) == 2


class DiskThatHeals:
    """The first `failures` writes fail."""

    def __init__(self, failures: int) -> None:
        self.left = failures

    def __call__(self, folder: Path) -> None:
        self.left -= 1
        if self.left >= 0:
            raise OSError(28, "No space left on device")
        (folder / "weights").write_bytes(b"w")


@pytest.mark.parametrize("told_before", [True, False], ids=["it has failed", "it is about to fail"])
async def test_a_run_that_stops_at_a_version_whose_write_failed_tries_it_once_more(
    tmp_path: Path, told_before: bool
) -> None:
    checkpointer, policy, said = make(tmp_path)
    policy.write = DiskThatHeals(1)
    await checkpointer.after(2)
    if told_before:
        await checkpointer.finish()
    assert await checkpointer.last(2) == 2
    assert len(said) == 1
    assert "version 2 could not be written: [Errno 28] No space left" in said[0]


async def test_a_run_that_stops_on_a_disk_that_stays_full_names_it(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path)
    policy.write = DiskThatHeals(2)
    await checkpointer.after(2)
    with pytest.raises(RunError, match=r"version 2 could not be written: .* No space left on device"):
        await checkpointer.last(2)


@pytest.mark.parametrize("failures", [1, 2])
async def test_a_run_does_not_end_well_without_its_last_checkpoint(tmp_path: Path, failures: int) -> None:
    """The policy's part is that of the cut, although training has gone on."""
    checkpointer, policy, said = make(tmp_path, every=8)
    policy.write = DiskThatHeals(failures)
    await run_to(checkpointer, policy, 1, 9)
    assert "warning: the checkpoint of version 8 could not be written" in said[0]
    if failures == 1:
        await checkpointer.conclude()
        assert checkpointer.store.versions() == [8]
    else:
        with pytest.raises(RunError, match=r"version 8 could not be written: .* No space left on device"):
            await checkpointer.conclude()
    assert policy.num_snapshots == 1


async def test_a_run_whose_last_checkpoint_took_too_long_does_not_end_well(tmp_path: Path) -> None:
    checkpointer, policy, _ = make(tmp_path, every=8)
    policy.write = lambda folder: (_ for _ in ()).throw(DeadlineError("writing took longer than 5 s"))
    await run_to(checkpointer, policy, 8, 9)
    with pytest.raises(RunError, match="version 8 could not be written: writing took longer than 5 s"):
        await checkpointer.conclude()


async def test_a_later_checkpoint_makes_up_for_one_that_failed(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path)
    policy.write = DiskThatHeals(1)
    await run_to(checkpointer, policy, 1, 9)
    await checkpointer.conclude()
    assert checkpointer.store.versions() == [6, 8]
    assert len(said) == 1


async def test_weights_that_are_not_finite_are_not_written_at_the_end_either(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path, every=8)
    policy.write = spoil
    await run_to(checkpointer, policy, 8, 9)
    await checkpointer.conclude()
    assert checkpointer.store.versions() == []
    assert len(said) == 1


async def test_a_version_is_cut_once(tmp_path: Path) -> None:
    """A signal right after a cut: what is being written is waited for, not written again."""
    checkpointer, policy, _ = make(tmp_path)
    await checkpointer.after(2)
    await checkpointer.last(2)
    assert policy.num_snapshots == 1
    assert checkpointer.store.versions() == [2]


REWARDS = {1: 0.1, 2: 0.3, 3: 0.8, 4: 0.6, 5: 0.2, 6: 0.4, 7: 0.1, 8: 0.0}
"""Of the step that makes each version: 0.2, 0.7, 0.3 and 0.05 on average for the cuts of 2, 4, 6 and 8."""


async def run_to(checkpointer: Checkpointer, policy: StandIn, first: int, last: int) -> None:
    for version in range(first, last + 1):
        policy.version = version
        await checkpointer.after(version)
    await checkpointer.finish()


def best_json(checkpointer: Checkpointer) -> Any:
    return json.loads((checkpointer.store.path / "best.json").read_text())


@pytest.mark.parametrize(("mode", "kept", "value"), [("max", [4, 6, 8], 0.7), ("min", [6, 8], 0.05)])
async def test_the_best_is_kept_besides_the_newest(tmp_path: Path, mode: str, kept: list[int], value: float) -> None:
    checkpointer, policy, said = make(tmp_path, rewards=REWARDS, metric="reward", mode=mode)
    await run_to(checkpointer, policy, 1, 8)
    assert checkpointer.store.versions() == kept
    best = best_json(checkpointer)
    assert (best["version"], best["metric"], best["mode"]) == (4 if mode == "max" else 8, "reward", mode)
    assert best["value"] == pytest.approx(value)
    assert said == []


async def test_the_best_is_kept_when_another_process_goes_on(tmp_path: Path) -> None:
    """Nothing is remembered but what lies in the checkpoints; `best.json` itself is not needed."""
    first, policy, _ = make(tmp_path, rewards=REWARDS, metric="reward")
    await run_to(first, policy, 1, 6)
    (first.store.path / "best.json").unlink()
    again, policy, _ = make(tmp_path, rewards=REWARDS, metric="reward")
    again.store.discard_after(6)
    await run_to(again, policy, 7, 8)
    assert again.store.versions() == [4, 6, 8]
    again.store.discard_after(2)
    assert not (again.store.path / "best.json").exists()


async def test_a_process_killed_before_it_prunes_leaves_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer, policy, said = make(tmp_path, rewards=REWARDS, metric="reward")
    await run_to(checkpointer, policy, 1, 4)
    with monkeypatch.context() as killed:
        killed.setattr(CheckpointStore, "_prune", lambda store: (_ for _ in ()).throw(RunError("killed")))
        await run_to(checkpointer, policy, 5, 6)
    assert checkpointer.store.versions() == [2, 4, 6]
    assert "killed" in said[0]
    await run_to(checkpointer, policy, 7, 8)
    assert checkpointer.store.versions() == [4, 6, 8]


async def test_a_metric_that_is_not_logged_is_told_at_the_first_step(tmp_path: Path) -> None:
    checkpointer, policy, said = make(tmp_path, rewards=REWARDS, metric="rewards")
    await run_to(checkpointer, policy, 1, 6)
    assert len(said) == 1
    assert "checkpoint.best.metric: the step has logged no 'rewards'" in said[0]
    assert "did you mean 'reward'?" in said[0]
    assert checkpointer.store.versions() == [4, 6]
    assert not (checkpointer.store.path / "best.json").exists()
