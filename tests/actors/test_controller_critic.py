"""With a critic every token has an advantage before the policy steps, and the critic learns while it does."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.critic_group import CriticLesson
from actors.errors import PolicyLostError
from actors.journal import fates, read
from algorithms.config import AdaptDepthConfig, StalenessConfig
from algorithms.depth import DepthController
from algorithms.types import Batch, GroupSummary, Update
from tests.actors.test_controller import Bench


class Critic:
    """Says of each token of a rollout the version at which it was asked."""

    def __init__(self, bench: Bench, warmup_steps: int = 0) -> None:
        self.bench = bench
        self.warmup_steps = warmup_steps
        self.lost_at: int | None = None

    async def compute_values(self, groups: list[GroupSummary], scored: list[Any], batch: Batch) -> CriticLesson:
        self.bench.events.append(f"values {batch.version}")
        assert len(scored) == len(groups)
        places = [(group, rollout) for group in range(len(groups)) for rollout in range(2)]
        known = {
            (group, rollout): np.full(groups[group].num_loss_tokens_G[rollout], batch.version + rollout, np.float32)
            for group, rollout in places[:-1]  # the last one has no reward
        }
        return CriticLesson(known, batch, 0.0)

    async def train_step(self, lesson: CriticLesson, scored: list[Any]) -> dict[str, float]:
        version = lesson.batch.version
        self.bench.events.append(f"critic begins {version}")
        await asyncio.sleep(0.02)
        if version == self.lost_at:
            raise PolicyLostError("a sign of life of critic rank 0 took longer than 5 s")
        self.bench.events.append(f"critic ends {version}")
        return {"value/loss": 0.5, "value/skipped": 0.0}


def bench_with_critic(folder: Path, **keys: Any) -> tuple[Bench, Critic]:
    critic_keys = {"warmup_steps": keys.pop("warmup_steps", 0)}
    bench = Bench(folder, **keys)
    critic = Critic(bench, **critic_keys)
    stand_in: Any = critic
    bench.controller.critic = stand_in

    async def rest(batch: Batch) -> Update:
        bench.events.append(f"rest {batch.version}")
        metrics = {"policy/skipped": 0.0, "policy/updates": 0.0, "policy/learning_rate_factor": 1.0, "step_time": 1.0}
        return Update(batch.version, batch.version + 1, metrics)

    policy: Any = bench
    policy.rest = rest
    return bench, critic


async def test_values_come_first_and_the_critic_is_done_before_the_step_is_reported(tmp_path: Path) -> None:
    bench, _ = bench_with_critic(tmp_path, num_steps=2)
    reported: list[Update] = []
    report = bench.controller.report

    async def noted(groups: Any, batch: Batch, update: Update) -> Any:
        reported.append(update)
        return await report(groups, batch, update)

    bench.controller.report = noted
    await bench.run()
    of_first = bench.events[1 : bench.events.index("values 1")]
    assert of_first[0] == "values 0"
    assert set(of_first[1:4]) == {"critic begins 0", "step 0", "publish 1"}
    assert of_first[4:] == ["critic ends 0", "report 1", "settled 1"]
    assert [update.metrics["value/loss"] for update in reported] == [0.5, 0.5]
    assert all("sampling/ess" in update.metrics for update in reported)


async def test_each_rollout_has_its_tokens_advantages_and_one_without_a_reward_has_none(tmp_path: Path) -> None:
    bench, _ = bench_with_critic(tmp_path, num_steps=2)
    await bench.run()
    for version, batch in enumerate(bench.batches):
        samples = {(s.group, s.rollout): s for rank in batch.ranks for micro in rank for s in micro.samples}
        assert set(samples) == {(0, 0), (0, 1), (1, 0), (1, 1)}
        unscored = samples.pop((1, 1))
        assert unscored.advantages_L is None
        for (_, rollout), sample in samples.items():
            assert sample.advantages_L is not None
            assert set(sample.advantages_L) == {version + rollout}
            assert sample.advantage == version + rollout, "the mean, for the sample log"


async def test_the_policy_rests_while_the_critic_warms_up(tmp_path: Path) -> None:
    bench, _ = bench_with_critic(tmp_path, num_steps=4, warmup_steps=3)
    await bench.run()
    steps = [event for event in bench.events if event.startswith(("rest", "step"))]
    assert steps == ["rest 0", "rest 1", "rest 2", "step 3"]
    assert [event for event in bench.events if event.startswith("publish")] == [f"publish {v}" for v in range(5)]
    assert bench.ledger.num_trained == 8


async def test_what_the_critic_has_learned_from_was_not_sampled_in_vain(tmp_path: Path) -> None:
    """The policy's step is skipped all the same, and its groups are not trained."""
    bench, _ = bench_with_critic(tmp_path, num_steps=3)
    bench.skipped = {1}
    await bench.run()
    assert (bench.ledger.num_trained, bench.ledger.num_left_out("non_finite")) == (4, 2)
    assert "non_finite" not in bench.ledger.waste
    assert list(fates(read(bench.path)).problems()) == []


async def test_a_step_that_measures_nothing_of_the_policy_moves_no_depth(tmp_path: Path) -> None:
    found = []
    for warmup_steps in (0, 6):
        depth = DepthController(AdaptDepthConfig(smoothing=0.0), lowest=2, highest=8, depth=8)
        keys: dict[str, Any] = {"num_steps": 6, "staleness": StalenessConfig(max_staleness=2), "depth": depth}
        bench, _ = bench_with_critic(tmp_path / str(warmup_steps), warmup_steps=warmup_steps, **keys)
        await bench.run()
        found.append(depth.depth)
    assert found[0] < found[1] == 8


async def test_a_critic_that_is_lost_ends_the_life(tmp_path: Path) -> None:
    bench, critic = bench_with_critic(tmp_path)
    critic.lost_at = 1
    with pytest.raises(PolicyLostError, match="critic rank 0"):
        await bench.run()
    assert "report 2" not in bench.events
