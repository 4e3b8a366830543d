"""The whole algorithm: prompts become groups in one coroutine, and weight versions in the other.

    produce: slot -> prompt -> group -> scored group         learn: batch -> update -> weight version -> replicas

They meet in the pacer, which lets a group be dispatched only if it can be trained within `max_staleness` versions, and
a batch be taken only if nothing older is left behind. Synchronous training is `max_staleness: 0`; there is no second
loop.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.data.prompts import PromptStream
from actors.deadline import within
from actors.errors import ReplicaDeadError, RunError, last_line
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup
from actors.policy_group import PolicyGroup
from actors.publisher import Publisher
from actors.router import Router
from algorithms.advantages import advantages
from algorithms.config import GrpoConfig
from algorithms.pacing import Slot
from algorithms.packing import build_batch
from algorithms.types import Batch, Prompt, Update


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up on one group, and when on the run."""

    group_timeout_s: float
    """Deadline of one group: generation, reference and reward."""
    max_attempts: int
    max_quarantined: int


@dataclass(slots=True)
class Controller:
    """Wires the actors; every decision is made elsewhere, in pure code."""

    num_steps: int
    max_staleness: int
    algorithm: GrpoConfig
    max_tokens_per_micro_batch: int
    limits: Limits
    prompts: PromptStream
    pacer: AsyncPacer
    router: Router
    policy: PolicyGroup
    publisher: Publisher
    ledger: Ledger
    report: Callable[[list[ReadyGroup], Batch, Update], Awaitable[None]]
    """Called after each step with its groups, the batch and the update: metrics, samples, progress."""

    async def run(self) -> None:
        """Train `num_steps` updates; raises what stopped the run."""
        await self._publish(0)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.produce(), name="produce")
            tasks.create_task(self.learn(), name="learn")

    async def produce(self) -> None:
        async with asyncio.TaskGroup() as fills:
            async for slot in self.pacer.slots():
                fills.create_task(self.fill(slot), name=f"group-{slot.ordinal}")

    async def fill(self, slot: Slot) -> None:
        prompt = self._prompt(slot)
        replica = self.router.choose()
        self.ledger.dispatched(slot, replica)
        summary, scored = self.router.dispatch(replica, prompt, slot.attempt)
        try:
            group = ReadyGroup(
                slot, await within(self.limits.group_timeout_s, summary, f"group {slot.ordinal}"), scored
            )
        except (RayError, RunError) as error:
            await self._failed(slot, replica, error)
        else:
            self.ledger.scored(group.summary)
            if not await self.pacer.finished(slot, group):
                self.ledger.late(slot)
        finally:
            self.router.done(replica)

    async def learn(self) -> None:
        for _ in range(self.num_steps):
            groups = await self.pacer.take()
            batch = self.batch(groups)
            update = await self.policy.step(batch, [group.scored for group in groups])
            await self._publish(update.version)
            self.ledger.trained(groups, update)
            await self.report(groups, batch, update)

    def batch(self, groups: list[ReadyGroup]) -> Batch:
        """Advantages against each group's own baseline, packed for the ranks."""
        summaries = [group.summary for group in groups]
        version = self.publisher.committed
        assert version is not None
        oldest = min(summary.oldest_version for summary in summaries)
        assert 0 <= version - oldest <= self.max_staleness, f"tokens of version {oldest} in the batch of {version}"
        return build_batch(
            summaries,
            advantages([s.rewards_G for s in summaries], self.algorithm.scale_rewards),
            version=version,
            num_ranks=len(self.policy.ranks),
            max_tokens=self.max_tokens_per_micro_batch,
            mask_truncated=self.algorithm.mask_truncated_completions,
        )

    def _prompt(self, slot: Slot) -> Prompt:
        try:
            return self.prompts.prompt(slot.ordinal)
        except ValueError as error:
            raise RunError(str(error)) from error

    async def _publish(self, version: int) -> None:
        await self.publisher.publish(version)
        await self.pacer.published(version)

    async def _failed(self, slot: Slot, replica: int, error: BaseException) -> None:
        """Try the prompt again under its ordinal; after too many attempts set it aside, and count it."""
        cause = f"replica {replica}: {last_line(error)}"
        # An actor error that comes wrapped in a task error is about a worker behind the replica.
        died = isinstance(error, RayActorError) and not isinstance(error, RayTaskError)
        if died or isinstance(error, ReplicaDeadError):
            raise RunError(f"rollout replica {replica} died while it sampled group {slot.ordinal}: {last_line(error)}")
        self.ledger.failed(slot, cause)
        if slot.attempt + 1 < self.limits.max_attempts:
            await self.pacer.failed(slot)
            return
        self.ledger.quarantined(slot, cause)
        if self.ledger.num_quarantined > self.limits.max_quarantined:
            raise RunError(
                f"group {slot.ordinal} failed {slot.attempt + 1} times ({cause}); rollout.max_quarantined allows "
                f"{self.limits.max_quarantined} such groups in a run"
            )
        await self.pacer.dropped(slot)
