"""After a publication a real vLLM replica computes what the policy computes, for tied and untied embeddings.

The replica starts from other weights than the policy on purpose: agreement can only come over the wire.
"""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.model.tiny import byte_tokenizer, make_tiny_model
from actors.objective import Objective
from actors.policy import policy_actor
from actors.policy_calls import PolicySettings
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher
from actors.recipe.model import TinyModel
from actors.recipe.policy import LoraConfig, PolicyConfig
from actors.recipe.rollout import GenerationConfig, RolloutConfig
from actors.rollout import RolloutActor, RolloutSettings
from algorithms.config import GrpoConfig, OptimizerConfig
from algorithms.types import Batch, Group, MicroBatch, Prompt, Rollout, Sample, ScoredGroup, VersionSpan
from sync.config import SyncConfig
from tests.actors.fleets import fleet_of
from tests.prove import ONLY_PROVE

AGREEMENT = 1e-3  # nats, float32 on both sides
PROBE = [40, 41, 42, 43, 44, 90, 91, 92, 93, 94, 120, 121, 122, 123]


class NoReward:
    async def score(self, group: Group, completions: list[str]) -> ScoredGroup:
        return ScoredGroup(group, (None,) * len(group.rollouts), {}, completions=tuple(completions))


def probe() -> Rollout:
    length = len(PROBE)
    return Rollout(
        token_ids_T=np.array(PROBE, np.int32),
        loss_mask_T=np.arange(length) >= 1,
        logprobs_T=np.full(length, -5.0, np.float32),
        spans=(VersionSpan(0, 1, length),),
        finish_reason="stop",
    )


def one_step(version: int) -> tuple[Batch, list[Group]]:
    group = Group(Prompt(0, 0, (), "", {}), (probe(),), 0, 0)
    sample = Sample(0, 0, len(PROBE), 1.0)
    return Batch(version, ((MicroBatch((sample,)),),), 1, len(PROBE) - 1, 0), [group]


def policy_settings(path: Path, zero_stage: int, lora: LoraConfig | None = None) -> PolicySettings:
    return PolicySettings(
        model_path=str(path),
        revision=None,
        trust_remote_code=False,
        num_ranks=1,
        use_gpu=False,
        seed=0,
        num_steps=20,
        policy=PolicyConfig(zero_stage=zero_stage, lora=lora),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        objective=Objective(GrpoConfig(), 1.0, 160),
        run_dir=str(path),
    )


def rollout_settings(path: Path, update: str, lora: LoraConfig | None = None) -> RolloutSettings:
    return RolloutSettings(
        model_path=str(path),
        revision=None,
        trust_remote_code=False,
        num_generations=4,
        generation=GenerationConfig(max_prompt_length=40, max_completion_length=160),
        rollout=RolloutConfig(num_threads=1),
        tensor_parallel_size=1,
        use_gpu=False,
        seed=0,
        score_timeout_s=60.0,
        in_flight_updates=update != "finish",
        recompute_kv_cache=update == "recompute",
        lora=lora,
    )


class Bench:
    """One policy rank and one replica, joined."""

    def __init__(
        self,
        policy_path: Path,
        replica_path: Path,
        zero_stage: int,
        update: str,
        lora: LoraConfig | None = None,
        **sync: Any,
    ) -> None:
        import ray

        self.rank = policy_actor().options(num_cpus=0.5).remote(0, policy_settings(policy_path, zero_stage, lora))
        reward = ray.remote(num_cpus=0.1)(NoReward).remote()
        self.replica = ray.remote(num_cpus=1)(RolloutActor).remote(
            0, rollout_settings(replica_path, update, lora), [reward], []
        )
        self.group = PolicyGroup((self.rank,), 160, 120.0)
        # Small buckets, so that a version takes several broadcasts.
        config = SyncConfig(bucket_mb=0.1, timeout_s=60.0, **sync)
        self.fleet = fleet_of([self.replica])
        self.publisher = Publisher(self.group, self.fleet, 1, "float32", config, member_timeout_s=60.0)

    async def start(self) -> None:
        await asyncio.gather(self.fleet.start(), self.group.start(120.0))
        await self.publisher.connect()

    async def difference(self) -> float:
        """Largest difference of a log-probability between policy and replica on the probe."""
        ours = (await self.rank.logprobs.remote([probe()]))[0]
        theirs = await self.replica.score_tokens.remote(PROBE)
        return float(np.abs(np.array(ours) - np.array(theirs)).max())

    def kill(self) -> None:
        import ray

        ray.get(self.replica.close.remote(), timeout=60)
        ray.kill(self.rank)
        ray.kill(self.replica)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("tied", "zero_stage", "sync"),
    [
        pytest.param(True, 1, {}, id="staged"),
        pytest.param(False, 3, {"delta": True}, id="delta", marks=ONLY_PROVE),
        pytest.param(True, 1, {"staging": "none"}, id="not-staged", marks=ONLY_PROVE),
    ],
)
def test_the_replica_computes_what_the_policy_computes(
    local_ray: None, tmp_path: Path, tied: bool, zero_stage: int, sync: dict[str, Any]
) -> None:
    for name, seed in (("policy", 5), ("replica", 6)):
        config = TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=1, tie_word_embeddings=tied)
        make_tiny_model(config, tmp_path / name, seed)
    bench = Bench(tmp_path / "policy", tmp_path / "replica", zero_stage, "keep", **sync)

    async def run() -> dict[str, Any]:
        await bench.start()
        before = await bench.difference()
        await bench.publisher.publish(0)
        differences = [await bench.difference()]
        for version in range(3):
            await bench.group.step(*one_step(version))
            stale = await bench.difference()
            assert stale > 10 * AGREEMENT, "the step must move the policy for the check to mean something"
            await bench.publisher.publish(version + 1)
            differences.append(await bench.difference())
        return {"before": before, "after": differences, "metrics": bench.publisher.metrics}

    try:
        result = asyncio.run(run())
    finally:
        bench.kill()
    assert result["before"] > 10 * AGREEMENT
    assert max(result["after"]) < AGREEMENT, result
    assert result["metrics"]["weights/version"] == 3


@pytest.mark.cluster
@pytest.mark.parametrize(
    "update", ["keep", *(pytest.param(update, marks=ONLY_PROVE) for update in ("recompute", "finish"))]
)
def test_tokens_carry_the_version_that_sampled_them(local_ray: None, tiny_models: dict[str, Path], update: str) -> None:
    """A version is swapped in while groups are sampled: they go on (or finish first); every token knows its weights."""
    bench = Bench(tiny_models["untied"], tiny_models["other"], 1, update)

    async def run() -> list[ScoredGroup]:
        await bench.start()
        await bench.publisher.publish(0)
        # One group alone first, so that the engine is warm and the others are under way when versions change.
        await bench.replica.fill.remote(Prompt(100, 0, tuple(PROBE), "", {}), 0)[1]
        scored = [bench.replica.fill.remote(Prompt(index, 0, tuple(PROBE), "", {}), 0)[1] for index in range(12)]
        sampling = asyncio.gather(*scored)
        version = 0
        while version < 30 and not sampling.done():
            await bench.group.step(*one_step(version))
            version += 1
            await bench.publisher.publish(version)
        late = await bench.replica.fill.remote(Prompt(101, 0, tuple(PROBE), "", {}), 0)[1]
        return [*await sampling, late]

    try:
        groups = asyncio.run(run())
    finally:
        bench.kill()
    for scored in groups:
        for rollout in scored.group.rollouts:
            assert rollout.spans[0].start == len(PROBE)
            assert rollout.spans[-1].stop == rollout.num_tokens
            for earlier, later in zip(rollout.spans, rollout.spans[1:], strict=False):
                assert earlier.stop == later.start
                assert earlier.version < later.version
            assert (rollout.logprobs_T[rollout.loss_mask_T] < 0).all()
    mixed = any(len(rollout.spans) > 1 for scored in groups for rollout in scored.group.rollouts)
    assert mixed == (update != "finish")
    last = {span.version for rollout in groups[-1].group.rollouts for span in rollout.spans}
    assert last == {bench.publisher.committed}, "after a commit no older version samples"


@pytest.mark.cluster
def test_a_checkpoint_is_a_model_that_vllm_loads(local_ray: None, tmp_path: Path) -> None:
    """The replica starts from it, and no version is published."""
    import ray

    config = TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=1, tie_word_embeddings=True)
    make_tiny_model(config, tmp_path / "policy", 5)
    rank: Any = policy_actor().options(num_cpus=0.5).remote(0, policy_settings(tmp_path / "policy", 1))
    group = PolicyGroup((rank,), 160, 120.0)

    async def first() -> list[float]:
        await group.start(120.0)
        await group.step(*one_step(0))
        await group.snapshot()
        await group.write_snapshot(tmp_path, 60.0)
        logprobs: list[list[float]] = await rank.logprobs.remote([probe()])
        return logprobs[0]

    ours = asyncio.run(first())
    ray.kill(rank)
    byte_tokenizer(256).save_pretrained(tmp_path / "model")
    settings = rollout_settings(tmp_path / "model", "keep")
    replica: Any = ray.remote(num_cpus=1)(RolloutActor).remote(0, settings, [], [])
    try:
        ray.get(replica.start.remote(), timeout=200)
        theirs = ray.get(replica.score_tokens.remote(PROBE), timeout=60)
    finally:
        ray.get(replica.close.remote(), timeout=60)
        ray.kill(replica)
    assert np.abs(np.array(ours) - np.array(theirs)).max() < AGREEMENT
