"""An interrupted group loses no token: any replica goes on from it, and every token's log-probability is its weights'.

Two real vLLM replicas and a policy rank. The random model ends about every 160 tokens, so a group that is caught in the
middle has rollouts that had finished and rollouts that had not. Every version's weights are kept on disk, so that each
token is checked against plain transformers at the version that its span names.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.model.tiny import make_tiny_model
from actors.objective import Objective
from actors.policy import policy_actor
from actors.policy_calls import PolicySettings
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher
from actors.recipe.model import TinyModel
from actors.recipe.policy import PolicyConfig
from actors.recipe.rollout import GenerationConfig, RolloutConfig
from actors.rollout import RolloutActor, RolloutSettings
from actors.sampled import INTERRUPTED, Interrupted
from algorithms.config import GrpoConfig, OptimizerConfig
from algorithms.types import (
    Batch,
    Group,
    GroupSummary,
    MicroBatch,
    Prompt,
    Rollout,
    Sample,
    ScoredGroup,
    VersionSpan,
)
from sync.config import SyncConfig
from tests.actors.fleets import fleet_of

pytestmark = pytest.mark.cluster

AGREEMENT = 1e-3  # nats, float32 on both sides
NUM_GENERATIONS, MAX_PROMPT, MAX_COMPLETION = 8, 40, 400
DEADLINE_S = 60.0
WAITS_S = [0.1 * 1.3**n for n in range(12)]
"""How long a group may be sampled before it is interrupted: the first that fits the machine is found by trying."""


class GatedReward:
    """Scores nothing; a closed gate keeps groups in scoring."""

    def __init__(self) -> None:
        self.gate, self.waiting = asyncio.Event(), asyncio.Event()
        self.gate.set()

    async def close(self) -> None:
        self.gate.clear()
        self.waiting.clear()

    async def reached(self) -> None:
        await self.waiting.wait()

    async def open(self) -> None:
        self.gate.set()

    async def score(self, group: Group, completions: list[str]) -> ScoredGroup:
        self.waiting.set()
        await self.gate.wait()
        return ScoredGroup(group, (None,) * len(group.rollouts), {}, completions=tuple(completions))


class PausableRollout(RolloutActor):
    """A replica that stands still where a publication would make it stand still, for as long as the test likes."""

    async def pause(self) -> None:
        await self.engine.pause_generation(mode="keep", clear_cache=False)

    async def resume(self) -> None:
        await self.engine.resume_generation()

    async def fill_and_interrupt(self, prompt: Prompt) -> Any:
        """Interrupt a group that this actor knows and its engine does not: the request is still being prepared."""
        filling = asyncio.create_task(self.fill(prompt, 0))
        await asyncio.sleep(0)
        known = self._generations[prompt.ordinal, 0]
        assert not known.admitted
        await self.interrupt([(prompt.ordinal, 0)])
        return await filling

    async def num_unfinished(self) -> int:
        return int(self.engine.get_num_unfinished_requests())


@dataclass
class Bench:
    """A policy rank and two replicas, joined; `models[v]` is the folder with the weights of version v."""

    policy: PolicyGroup
    replicas: tuple[Any, Any]
    reward: Any
    publisher: Publisher
    folder: Path
    models: dict[int, Path] = field(default_factory=dict)
    num_prompts: int = 0

    def prompt(self) -> Prompt:
        self.num_prompts += 1
        token_ids = tuple(32 + (7 * self.num_prompts + index) % 90 for index in range(20))
        return Prompt(self.num_prompts, 0, token_ids, "", {})

    async def fill(self, replica: int, prompt: Prompt, partial: Group | None = None, attempt: int = 0) -> Any:
        answer, group = self.replicas[replica].fill.remote(prompt, attempt, partial)
        return await asyncio.wait_for(asyncio.gather(answer, group), DEADLINE_S)

    async def interrupt(self, replica: int, *keys: tuple[int, int]) -> None:
        await asyncio.wait_for(self.replicas[replica].interrupt.remote(list(keys) or None), DEADLINE_S)

    async def caught(self, wait_s: float, prompt: Prompt) -> tuple[Any, Any]:
        """What replica 0 has of a group after `wait_s`."""
        filling = asyncio.create_task(self.fill(0, prompt))
        await asyncio.sleep(wait_s)
        await self.interrupt(0, (prompt.ordinal, 0))
        return await filling

    async def caught_in_the_middle(self) -> Group:
        """A group with finished rollouts, and with others that have tokens and are not finished."""
        for wait_s in WAITS_S:
            answer, group = await self.caught(wait_s, self.prompt())
            if isinstance(answer, GroupSummary):
                break
            reasons = {rollout.finish_reason for rollout in group.rollouts if rollout.num_loss_tokens}
            if INTERRUPTED in reasons and len(reasons) > 1:
                check_partial(answer, group)
                return group
        raise AssertionError(f"no group was caught in the middle; the last try waited {wait_s:.1f} s")

    async def publish_next(self) -> None:
        """One step of the policy, and its weights on both replicas and on disk."""
        version = 0 if self.publisher.committed is None else self.publisher.committed + 1
        if version > 0:
            await self.policy.step(*one_step(version - 1))
        self.models[version] = self.folder / f"version-{version}"
        await self.policy.save(self.models[version])
        await self.publisher.publish(version)

    def check_logprobs(self, rollout: Rollout) -> None:
        """Each sampled token has the log-probability that the weights of its version give it."""
        for span in rollout.spans:
            sampled_T = rollout.logprobs_T[span.start : span.stop]
            expected_T = logprobs(self.models[span.version], rollout.token_ids_T)[span.start : span.stop]
            np.testing.assert_allclose(sampled_T, expected_T, atol=AGREEMENT, rtol=0)


def logprobs(model_path: Path, token_ids_T: Any) -> Any:
    """Log-probability of every token after those before it, by plain transformers; 0 for the first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokens_1T = torch.from_numpy(token_ids_T.astype(np.int64))[None]
    with torch.no_grad():
        logprobs_TV = model(tokens_1T).logits[0, :-1].log_softmax(-1)
    return np.concatenate([[0.0], logprobs_TV.gather(1, tokens_1T[0, 1:, None])[:, 0].numpy()])


def one_step(version: int) -> tuple[Batch, list[Group]]:
    token_ids_T = np.arange(40, 54, dtype=np.int32)
    length = len(token_ids_T)
    spans = (VersionSpan(0, 1, length),)
    rollout = Rollout(token_ids_T, np.arange(length) >= 1, np.full(length, -5.0, np.float32), spans, "stop")
    batch = Batch(version, ((MicroBatch((Sample(0, 0, length, 1.0),)),),), 1, length - 1, 0)
    return batch, [Group(Prompt(0, 0, (), "", {}), (rollout,), 0, 0)]


def under_way_through_a_swap(rollout: Rollout) -> bool:
    return rollout.finish_reason == INTERRUPTED and len(rollout.spans) > 1


def check_whole(rollouts: tuple[Rollout, ...], prompt: Prompt) -> None:
    """Prompt, then sampled tokens that the spans cover without gap, overlap or needless seam."""
    num_prompt = len(prompt.token_ids)
    for rollout in rollouts:
        assert tuple(rollout.token_ids_T[:num_prompt]) == prompt.token_ids
        assert not rollout.loss_mask_T[:num_prompt].any()
        assert rollout.loss_mask_T[num_prompt:].all()
        assert rollout.num_loss_tokens <= MAX_COMPLETION
        assert (rollout.finish_reason == "length") == (rollout.num_loss_tokens == MAX_COMPLETION)
        seams = [num_prompt, *(span.stop for span in rollout.spans)]
        assert [span.start for span in rollout.spans] == seams[:-1]
        assert seams[-1] == rollout.num_tokens
        versions = [span.version for span in rollout.spans]
        assert versions == sorted(set(versions))


def check_partial(answer: Interrupted, group: Group) -> None:
    check_whole(group.rollouts, group.prompt)
    versions = [span.version for rollout in group.rollouts for span in rollout.spans]
    assert (answer.ordinal, answer.attempt, answer.replica) == (group.prompt.ordinal, group.attempt, group.replica)
    assert answer.num_loss_tokens_G == tuple(rollout.num_loss_tokens for rollout in group.rollouts)
    assert (answer.oldest_version, answer.newest_version) == (min(versions), max(versions))
    assert 0 < answer.generate_s < DEADLINE_S


def check_resumed(answer: Any, scored: ScoredGroup, partial: Group, replica: int) -> None:
    """An ordinary scored group that begins with every token of the partial one."""
    assert isinstance(answer, GroupSummary)
    assert (answer.replica, scored.group.replica) == (replica, replica)
    check_whole(scored.group.rollouts, partial.prompt)
    for before, after in zip(partial.rollouts, scored.group.rollouts, strict=True):
        assert after.finish_reason in ("stop", "length")
        assert (after.token_ids_T[: before.num_tokens] == before.token_ids_T).all()
        assert (after.logprobs_T[: before.num_tokens] == before.logprobs_T).all()
        if before.finish_reason != INTERRUPTED:
            assert after.num_tokens == before.num_tokens
            assert (after.spans, after.finish_reason) == (before.spans, before.finish_reason)
        else:
            assert after.num_tokens > before.num_tokens


@pytest.fixture(scope="module")
def bench(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    import ray

    folder = tmp_path_factory.mktemp("interruption")
    config = TinyModel(kind="tiny", hidden_size=64, num_layers=2, num_heads=1, max_position_embeddings=512)
    make_tiny_model(config, folder / "tiny", seed=3)
    settings = RolloutSettings(
        model_path=str(folder / "tiny"),
        revision=None,
        trust_remote_code=False,
        num_generations=NUM_GENERATIONS,
        generation=GenerationConfig(max_prompt_length=MAX_PROMPT, max_completion_length=MAX_COMPLETION),
        rollout=RolloutConfig(num_threads=1),  # two engines on two cores
        tensor_parallel_size=1,
        use_gpu=False,
        seed=0,
        score_timeout_s=DEADLINE_S,
        in_flight_updates=True,
        recompute_kv_cache=True,  # else tokens after a swap attend to keys of the old weights, and agree with neither
    )
    policy_settings = PolicySettings(
        model_path=str(folder / "tiny"),
        revision=None,
        trust_remote_code=False,
        num_ranks=1,
        use_gpu=False,
        seed=0,
        num_steps=10,
        policy=PolicyConfig(num_threads=1),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        objective=Objective(GrpoConfig(), 1.0, MAX_COMPLETION),
        run_dir=str(folder),
    )
    reward = ray.remote(num_cpus=0.1)(GatedReward).remote()
    replica: Any = ray.remote(num_cpus=1)(PausableRollout)
    replicas = (replica.remote(0, settings, [reward], []), replica.remote(1, settings, [reward], []))
    rank = policy_actor().options(num_cpus=0.5).remote(0, policy_settings)
    policy = PolicyGroup((rank,), MAX_COMPLETION, 120.0)
    fleet = fleet_of(replicas)
    publisher = Publisher(policy, fleet, 1, "float32", SyncConfig(timeout_s=60.0), member_timeout_s=60.0)
    bench = Bench(policy, replicas, reward, publisher, folder)

    async def start() -> None:
        await asyncio.gather(fleet.start(), policy.start(120.0))
        await publisher.connect()
        await bench.publish_next()
        # The first tokens of an engine take long; groups are to be caught by the time that the others take.
        await asyncio.gather(bench.fill(0, bench.prompt()), bench.fill(1, bench.prompt()))

    asyncio.run(start())
    yield bench
    ray.get([replica.close.remote() for replica in replicas], timeout=60)
    for actor in (*replicas, rank, reward):
        ray.kill(actor)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * DEADLINE_S))


def test_a_group_goes_on_elsewhere_with_every_token_it_had(bench: Bench) -> None:
    """Finished rollouts stay token for token; the others go on; at one version the seam cannot be seen."""

    async def test() -> None:
        partial = await bench.caught_in_the_middle()
        answer, scored = await bench.fill(1, partial.prompt, partial, attempt=1)
        check_resumed(answer, scored, partial, replica=1)
        assert all(len(rollout.spans) == 1 for rollout in scored.group.rollouts)
        for rollout in scored.group.rollouts:
            bench.check_logprobs(rollout)
        rollout = scored.group.rollouts[0]
        theirs_T = await bench.replicas[1].score_tokens.remote(rollout.token_ids_T.tolist())
        num_prompt = len(partial.prompt.token_ids)
        np.testing.assert_allclose(rollout.logprobs_T[num_prompt:], theirs_T[num_prompt - 1 :], atol=AGREEMENT, rtol=0)

    run(test())


def test_every_token_keeps_its_version_through_swaps_and_interruptions(bench: Bench) -> None:
    """A swap before the interruption, a second one before the resumption, and a second interruption."""

    async def test() -> None:
        for wait_s in WAITS_S:
            prompts = [bench.prompt() for _ in range(4)]
            filling = asyncio.gather(*(bench.fill(0, prompt) for prompt in prompts))
            await asyncio.sleep(wait_s / 4)
            await bench.publish_next()
            await asyncio.sleep(wait_s / 4)
            await bench.interrupt(0)
            partials = [group for answer, group in await filling if isinstance(answer, Interrupted)]
            mixed = [group for group in partials if any(map(under_way_through_a_swap, group.rollouts))]
            if mixed:
                break
        partial = mixed[0]
        await bench.publish_next()
        resuming = asyncio.create_task(bench.fill(1, partial.prompt, partial, attempt=1))
        await asyncio.sleep(0.1)
        await bench.interrupt(1, (partial.prompt.ordinal, 1))
        answer, group = await resuming
        if isinstance(answer, Interrupted):
            check_partial(answer, group)
            partial = group
            answer, group = await bench.fill(0, partial.prompt, partial, attempt=2)
        check_resumed(answer, group, partial, replica=answer.replica)
        for rollout in group.group.rollouts:
            bench.check_logprobs(rollout)
        assert max(len(rollout.spans) for rollout in group.group.rollouts) >= 3

    run(test())


def test_a_group_is_interrupted_before_its_first_token(bench: Bench) -> None:
    """While the engine stands still as for a swap, so that no token can come; and before the engine knows the group."""

    async def test() -> None:
        prompt = bench.prompt()
        await bench.replicas[0].pause.remote()
        filling = asyncio.create_task(bench.fill(0, prompt))
        await asyncio.sleep(0.2)
        await bench.interrupt(0, (prompt.ordinal, 0))
        answer, partial = await filling
        await bench.replicas[0].resume.remote()
        assert isinstance(answer, Interrupted)
        assert answer.num_loss_tokens_G == (0,) * NUM_GENERATIONS
        assert answer.oldest_version is answer.newest_version is None
        assert {rollout.finish_reason for rollout in partial.rollouts} == {INTERRUPTED}
        check_whole(partial.rollouts, prompt)
        answer, scored = await bench.fill(1, prompt, partial, attempt=1)
        check_resumed(answer, scored, partial, replica=1)

        prompt = bench.prompt()
        answer, partial = await asyncio.wait_for(bench.replicas[0].fill_and_interrupt.remote(prompt), DEADLINE_S)
        assert isinstance(answer, Interrupted)
        check_whole(partial.rollouts, prompt)
        assert await bench.replicas[0].num_unfinished.remote() == 0

    run(test())


def test_a_group_is_interrupted_while_the_engine_is_paused_for_a_swap(bench: Bench) -> None:
    async def test() -> None:
        for wait_s in WAITS_S:
            prompt, other = bench.prompt(), bench.prompt()
            filling = asyncio.create_task(bench.fill(0, prompt))
            staying = asyncio.create_task(bench.fill(0, other))
            await asyncio.sleep(wait_s)
            await bench.replicas[0].pause.remote()
            await bench.interrupt(0, (prompt.ordinal, 0))
            answer, partial = await filling  # the engine need not run again for it
            await bench.replicas[0].resume.remote()
            assert isinstance((await staying)[0], GroupSummary), "the others go on"
            if isinstance(answer, Interrupted) and max(answer.num_loss_tokens_G) > 0:
                break
        check_partial(answer, partial)
        answer, scored = await bench.fill(0, prompt, partial, attempt=0)  # the same replica and attempt will do
        check_resumed(answer, scored, partial, replica=0)
        for rollout in scored.group.rollouts:
            bench.check_logprobs(rollout)

    run(test())


def test_interrupting_what_is_unknown_or_being_scored_does_nothing(bench: Bench) -> None:
    async def test() -> None:
        await bench.interrupt(0, (999, 0), (999, 1))
        await bench.interrupt(0)
        await bench.reward.close.remote()
        prompt = bench.prompt()
        filling = asyncio.create_task(bench.fill(0, prompt))
        await asyncio.wait_for(bench.reward.reached.remote(), DEADLINE_S)
        await bench.interrupt(0, (prompt.ordinal, 0))
        await bench.interrupt(0)
        await bench.reward.open.remote()
        answer, scored = await filling
        assert isinstance(answer, GroupSummary)
        check_whole(scored.group.rollouts, prompt)
        await bench.interrupt(0, (prompt.ordinal, 0))
        assert isinstance((await bench.fill(0, bench.prompt()))[0], GroupSummary)

    run(test())


def test_all_groups_of_a_replica_are_interrupted_and_finish_on_the_other(bench: Bench) -> None:
    async def test() -> None:
        prompts = [bench.prompt() for _ in range(6)]
        filling = asyncio.gather(*(bench.fill(0, prompt) for prompt in prompts))
        await asyncio.sleep(0.1)
        await bench.interrupt(0)
        await bench.interrupt(0)
        partials = await filling
        assert all(isinstance(answer, Interrupted) for answer, _ in partials)
        assert await bench.replicas[0].num_unfinished.remote() == 0
        resumed = await asyncio.gather(*(bench.fill(1, group.prompt, group, attempt=1) for _, group in partials))
        for (answer, scored), (_, partial) in zip(resumed, partials, strict=True):
            check_resumed(answer, scored, partial, replica=1)

    run(test())


def test_a_rollout_with_nothing_left_is_finished_by_length(bench: Bench) -> None:
    async def test() -> None:
        prompt = bench.prompt()
        token_ids_T = np.array([*prompt.token_ids, *[65] * MAX_COMPLETION], np.int32)
        loss_mask_T = np.arange(len(token_ids_T)) >= len(prompt.token_ids)
        spans = (VersionSpan(0, len(prompt.token_ids), len(token_ids_T)),)
        full = Rollout(token_ids_T, loss_mask_T, np.full(len(token_ids_T), -1.0, np.float32), spans, INTERRUPTED)
        partial = Group(prompt, (full,) * NUM_GENERATIONS, 0, 0)
        answer, scored = await bench.fill(1, prompt, partial, attempt=1)
        assert isinstance(answer, GroupSummary)
        assert all(answer.truncated_G)
        assert all((rollout.token_ids_T == token_ids_T).all() for rollout in scored.group.rollouts)

    run(test())
