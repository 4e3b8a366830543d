"""The whole algorithm: prompts become groups in one coroutine, and weight versions in the other.

    produce: slot -> prompt -> group -> scored group         learn: batch -> update -> weight version -> replicas

They meet in the pacer, which lets a group be dispatched only if it can be trained within `max_staleness` versions, and
a batch be taken only if nothing older is left behind. Synchronous training is `max_staleness: 0`; there is no second
loop.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.attempts import Attempts
from actors.critic_group import CriticGroup, CriticLesson
from actors.errors import StoppedError
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher
from actors.weighing import ByRewards, Lesson, Weighing, Weights
from algorithms.config import GrpoConfig, StalenessConfig
from algorithms.depth import DepthController
from algorithms.packing import build_batch, with_token_advantages
from algorithms.signal import Signal, signal
from algorithms.types import Batch, GroupSummary, Update


@dataclass(slots=True)
class Controller:
    """Wires the actors; every decision is made elsewhere, in pure code."""

    num_steps: int
    staleness: StalenessConfig
    algorithm: GrpoConfig
    max_tokens_per_micro_batch: int
    pacer: AsyncPacer
    attempts: Attempts
    policy: PolicyGroup
    publisher: Publisher
    ledger: Ledger
    depth: DepthController | None
    """Moves the pipeline depth with what the steps measure; None keeps it."""
    report: Callable[[list[ReadyGroup], Batch, Update], Awaitable[Mapping[str, float]]]
    """Called after each step with its groups, the batch and the update: the metrics, which it logs and returns."""
    health: Callable[[int, Mapping[str, float]], Awaitable[None]]
    """Called with the version and the metrics of each step: may warn, act, or stop the run."""
    settled: Callable[[int], Awaitable[None]]
    """Called with the version after each step, when nothing of it is left to do: checkpoints."""
    stopped: Callable[[int], Awaitable[int | None]]
    """Called instead of a further step when the run was asked to stop: takes the last checkpoint, and returns the
    version of the newest that there is."""
    first_version: int = 0
    """What the policy holds when the run begins, or goes on."""
    critic: CriticGroup | None = None
    """With algorithm.advantage 'gae' alone."""
    weighing: Weighing = field(default_factory=ByRewards)
    """What else the weights of a batch depend on."""

    async def run(self) -> None:
        """Train `num_steps` updates; raises what stopped the run."""
        async with self.publisher.admitting():
            async with self.publisher.exclusive:
                await self._publish(self.first_version)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.produce(), name="produce")
                tasks.create_task(self.learn(), name="learn")
        self.ledger.unneeded(self.pacer.leftover)

    async def produce(self) -> None:
        async with asyncio.TaskGroup() as groups:
            async for slot in self.pacer.slots():
                groups.create_task(self.attempts.make(slot), name=f"group-{slot.ordinal}")

    async def learn(self) -> None:
        for version in range(self.first_version, self.num_steps):
            taken = await self.pacer.take()
            if taken is None:
                newest = await self.stopped(version)
                raise StoppedError.after(version, self.num_steps, newest, self.pacer.why_stopped)
            self.attempts.discard(taken)
            judged = await self._judged(taken.batch)
            # Nobody is admitted between a step and its publication, and who shares the policy's GPUs rests.
            async with self.publisher.exclusive, self.publisher.resting():
                lesson = await self._lesson(taken.batch, judged)
                update = await self._step(lesson, judged)
            batch = lesson.batch
            self.ledger.trained(taken.batch, update, batch.oldest_version)
            await self._follow(update)
            metrics = await self.report(taken.batch, batch, update)
            await self.health(update.version, metrics)
            await self.settled(update.version)

    def batch(self, summaries: Sequence[GroupSummary], weights: Weights | None = None) -> Batch:
        """What the rewards say of each rollout, or `weights` in place of that, packed for the ranks."""
        version = self.publisher.committed
        assert version is not None
        oldest_version = max(0, version - self.staleness.max_staleness)
        for summary in summaries:
            counts = summary.newest_version if self.staleness.when_stale == "mask" else summary.oldest_version
            assert oldest_version <= counts <= version, f"tokens of version {counts} in the batch of {version}"
        worth = Signal([*weights], 0.0) if weights is not None else self._worth(summaries)
        return build_batch(
            summaries,
            worth.advantages,
            version=version,
            oldest_version=oldest_version,
            num_ranks=self.policy.num_teams,
            max_tokens=self.max_tokens_per_micro_batch,
            mask_truncated=self.algorithm.mask_truncated_completions,
            costs=self.policy.costs,
            kl_weight=worth.kl_weight,
        )

    def _worth(self, summaries: Sequence[GroupSummary]) -> Signal:
        return signal(summaries, self.algorithm, self.policy.max_completion_length)

    async def _judged(self, groups: list[ReadyGroup]) -> CriticLesson | None:
        """With a critic: what every token is worth, and what the critic is to learn."""
        if self.critic is None:
            return None
        summaries, scored = [group.summary for group in groups], [group.scored for group in groups]
        return await self.critic.compute_values(summaries, scored, self.batch(summaries))

    async def _lesson(self, groups: list[ReadyGroup], judged: CriticLesson | None) -> Lesson:
        """What the policy is to learn."""
        lesson = await self.weighing.lesson(groups, self.batch)
        if judged is None:
            return lesson
        return replace(lesson, batch=with_token_advantages(lesson.batch, judged.advantages))

    async def _step(self, lesson: Lesson, judged: CriticLesson | None) -> Update:
        """The next version, published; a critic learns at the same time, from values that it gave before."""
        if self.critic is None or judged is None:
            return await self._learned(lesson)
        async with asyncio.TaskGroup() as steps:
            learning = steps.create_task(self.critic.train_step(judged, lesson.groups), name="critic")
            update = await self._learned(lesson)
        return replace(update, metrics={**update.metrics, **learning.result()})

    async def _learned(self, lesson: Lesson) -> Update:
        """The policy's next version, published."""
        if self._rests(lesson.batch.version):
            update = await self.policy.rest(lesson.batch)
        else:
            update = await self.policy.step(lesson.batch, lesson.groups)
        await self._publish(update.version)
        return replace(update, metrics={**update.metrics, **lesson.metrics})

    def _rests(self, version: int) -> bool:
        """Whether the critic learns alone in the step at this version."""
        return self.critic is not None and version < self.critic.warmup_steps

    async def _publish(self, version: int) -> None:
        await self.publisher.publish(version)
        await self.pacer.published(version)

    async def _follow(self, update: Update) -> None:
        """The pipeline gets shallower when its samples are too far off policy, and deeper when they are not."""
        if self.depth is not None and not self._rests(update.step):
            # A sample size that is no finite number is not among the metrics, and the worst there is.
            ess = update.metrics.get("sampling/ess", math.nan)
            await self.pacer.set_depth(self.depth.update(ess, update.metrics.get("kl")))
