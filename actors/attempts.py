"""Every attempt at a group ends in one of five ways: scored, filtered, interrupted, failed, or too late.

An attempt is one dispatch of one prompt to one replica. Here it is followed to its end, and the pacer and the ledger
are told; what to do next is the pacer's decision.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import ray
from ray.exceptions import ObjectLostError, RayError

from actors.checkpoint.cut import Failures
from actors.data.prompts import PromptStream, over_budget
from actors.deadline import within
from actors.deaths import is_death, is_out_of_reach
from actors.errors import ReplicaDeadError, RunError, last_line
from actors.fleet import Fleet
from actors.ledger import Ledger
from actors.pacer import AsyncPacer, ReadyGroup, TakenGroups
from actors.router import Router
from actors.sampled import Interrupted
from algorithms.blame import MOST_BREAKS, MOST_IN_A_ROW, Blame
from algorithms.budgets import RewardBudget
from algorithms.config import FilterConfig
from algorithms.filters import verdict
from algorithms.slots import Slot
from algorithms.types import GroupSummary

_FETCH_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up on one group, and when on the run."""

    group_timeout_s: float
    """Deadline of one group: generation, reference and reward."""
    start_timeout_s: float
    """Of a replica, which may be the only one."""
    max_attempts: int
    max_quarantined: int
    max_bad_rows: int


@dataclass(slots=True)
class Attempts:
    """Nothing that was sampled disappears: it is handed to the pacer, kept for a resumption, or counted as waste."""

    limits: Limits
    dynamic_sampling: FilterConfig | None
    rewards: RewardBudget
    prompts: PromptStream
    pacer: AsyncPacer
    router: Router
    fleet: Fleet
    ledger: Ledger
    keeps_groups: bool = False
    """What was sampled is brought to the driver's machine at once: the replica's may go."""
    _partial: dict[int, ray.ObjectRef] = field(default_factory=dict)  # ordinal -> what an interrupted attempt has left
    _num_failures: Counter[int] = field(default_factory=Counter)  # by ordinal; interruptions do not count
    _blame: Blame = field(default_factory=Blame)
    _num_filtered_in_a_row: int = 0

    def state(self) -> Failures:
        """For a checkpoint."""
        return Failures(dict(self._num_failures), self._num_filtered_in_a_row)

    def restore(self, failures: Failures) -> None:
        """Go on counting from a checkpoint."""
        self._num_failures = Counter(failures.by_ordinal)
        self._num_filtered_in_a_row = failures.filtered_in_a_row

    async def make(self, slot: Slot) -> None:
        """Sample and score one group."""
        name, timeout_s = f"group {slot.ordinal}", self.limits.group_timeout_s
        try:
            prompt = self.prompts.prompt(slot.ordinal)
        except ValueError as error:
            await self._unusable(slot, error)
            return
        partial = self._partial.pop(slot.ordinal, None)
        dispatching = self.router.dispatch(prompt, slot, partial, self._blame.avoids(slot.ordinal))
        finding_s, clock = timeout_s + self.limits.start_timeout_s, self.fleet.clock
        sent = await clock.within(finding_s, dispatching, f"{name}: finding a replica")
        self.ledger.dispatched(slot, sent.replica)
        if self.pacer.exhausted or slot not in self.pacer.in_flight:  # it was called back while it waited for a place
            self.router.interrupt([slot])
        try:
            answer = await clock.within(timeout_s, sent.answer, name)
            group = await self._kept(name, sent.group)
        except asyncio.CancelledError:
            sent.forsake()
            raise
        except (RayError, RunError) as error:
            sent.forsake()
            await self._failed(slot, sent.replica, error)
        else:
            await self._arrived(slot, sent.replica, answer, group)
        finally:
            self.router.done(slot)

    async def _kept(self, name: str, group: ray.ObjectRef) -> ray.ObjectRef:
        """The group where it outlives its replica's machine, if need be."""
        if not self.keeps_groups:
            return group
        return ray.put(await within(_FETCH_TIMEOUT_S, group, f"{name}: fetching it"))

    def discard(self, taken: TakenGroups) -> None:
        """What leaves with a batch and is not trained: nothing in pace mode without over-sampling."""
        self.router.interrupt(taken.aborted)
        for slot in taken.aborted:  # what it had sampled before it was interrupted is too old for its next attempt, too
            self._partial.pop(slot.ordinal, None)
        for group in taken.requeued:
            summary = group.summary
            self.ledger.requeued(group.slot, summary.num_loss_tokens_G, summary.rewards_G, summary.generate_s)
        for group in taken.left_out:
            self.ledger.filtered(group.summary, self.pacer.left_out_cause)
        if self.pacer.exhausted:
            self.router.interrupt(self.pacer.in_flight)

    async def _unusable(self, slot: Slot, error: ValueError) -> None:
        """The row cannot be a prompt: it is set aside, and another takes its place."""
        if await self.pacer.dropped(slot):
            self.ledger.quarantined(slot, str(error), self.prompts.row(slot.ordinal))
        if self.ledger.num_bad_rows > self.limits.max_bad_rows:
            raise RunError(over_budget(error, self.limits.max_bad_rows)) from error

    async def _arrived(
        self, slot: Slot, replica: int, answer: GroupSummary | Interrupted, group: ray.ObjectRef
    ) -> None:
        if isinstance(answer, Interrupted):
            await self._interrupted(slot, answer, group)
            return
        self.router.learned(answer)
        for guilty, error in self._blame.well(slot.ordinal, replica):
            told = f"{MOST_IN_A_ROW} groups that others came through with failed on it in a row, at last for this"
            self.fleet.fence(guilty, f"{told}: {error}")
        spent = self.rewards.spent(answer.failures, answer.details)
        if spent is not None:
            raise RunError(spent)
        cause = verdict(answer, self.dynamic_sampling)
        if cause is not None:
            await self._filtered(slot, answer, cause)
        elif await self.pacer.finished(slot, ReadyGroup(slot, answer, group)):
            self._num_filtered_in_a_row = 0
            self.ledger.scored(answer)
        else:
            self.ledger.late(slot, sum(answer.num_loss_tokens_G))

    async def _interrupted(self, slot: Slot, answer: Interrupted, group: ray.ObjectRef) -> None:
        lengths = answer.num_loss_tokens_G
        if not await self.pacer.interrupted(slot, answer.oldest_version):
            self.ledger.requeued(slot, lengths, (), answer.generate_s)
        elif self.pacer.exhausted:
            self.ledger.stopped(slot, sum(lengths), answer.generate_s)
        else:
            self.ledger.interrupted(slot, sum(lengths))
            if answer.oldest_version is not None:
                self._partial[slot.ordinal] = group

    async def _filtered(self, slot: Slot, summary: GroupSummary, cause: str) -> None:
        """The recipe finds no signal in the group; another prompt takes its place."""
        if not await self.pacer.dropped(slot):
            self.ledger.late(slot, sum(summary.num_loss_tokens_G))
            return
        self.ledger.scored(summary)
        self.ledger.filtered(summary, cause)
        self._num_filtered_in_a_row += 1
        config = self.dynamic_sampling
        if config is not None and self._num_filtered_in_a_row > config.max_filtered_in_a_row:
            raise RunError(
                f"{self._num_filtered_in_a_row} groups in a row were filtered ({cause}), more than "
                "algorithm.dynamic_sampling.max_filtered_in_a_row allows: the policy finds the prompts all too easy or "
                "all too hard, or the reward does not tell its completions apart"
            )

    async def _failed(self, slot: Slot, replica: int, error: BaseException) -> None:
        """Try the prompt again under its ordinal; after too many failures set it aside, and count it.

        Where two replicas serve it has failed on both by then: one replica alone may be what fails.
        """
        cause = f"replica {replica}: {last_line(error)}"
        died = is_death(error)
        self.ledger.failed(slot, cause, "preempted" if died and self.fleet.is_leaving(replica) else "failed")
        if isinstance(error, ObjectLostError):  # what an interrupted attempt had left was on a machine that is gone
            await self.pacer.failed(slot)
            return
        if is_out_of_reach(error):
            await self._out_of_reach(slot, replica)
            return
        if died or isinstance(error, ReplicaDeadError):  # not the prompt's fault
            self.fleet.fence(replica, f"it died while it sampled group {slot.ordinal}: {last_line(error)}")
            await self.pacer.failed(slot)
            return
        if self.fleet.is_fenced(replica):  # what ends there now, ends for that
            await self.pacer.failed(slot)
            return
        self._blame.failed(slot.ordinal, replica, last_line(error))
        self._num_failures[slot.ordinal] += 1
        num_failures, tried = self._num_failures[slot.ordinal], self._blame.tried(slot.ordinal)
        unproved = len(tried) < 2 and self.router.serves_besides(tried)
        if num_failures < self.limits.max_attempts or unproved:
            await self.pacer.failed(slot)
            return
        self._blame.settled(slot.ordinal)
        if await self.pacer.dropped(slot):
            self.ledger.quarantined(slot, cause, self.prompts.row(slot.ordinal))
        if self.ledger.num_given_up > self.limits.max_quarantined:
            raise RunError(
                f"group {slot.ordinal}, of row {self.prompts.row(slot.ordinal)} of the data set, failed {num_failures} "
                f"times ({cause}); rollout.max_quarantined allows {self.limits.max_quarantined} such groups in a run"
            )

    async def _out_of_reach(self, slot: Slot, replica: int) -> None:
        """The attempt is lost, wherever it has got to, and that is not the prompt's fault; of the replica it is asked
        whether it lives. The attempt may be there still: it is to take no more of the engine's time."""
        self.router.interrupt([slot])
        if not self.router.is_shunned(replica) and self._blame.broke(replica):  # one break ends all that it samples
            self.fleet.fence(replica, f"its connection broke {MOST_BREAKS} times, and no group came through in between")
        with self.router.shunned(replica):
            waits = self.fleet.num_serving < 2
            if not waits:  # it goes on elsewhere at once
                await self.pacer.failed(slot)
            await self.fleet.look_after(replica)
        if waits:
            await self.pacer.failed(slot)
