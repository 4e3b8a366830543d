"""The policy as one: every call goes to all ranks, and all must answer within the deadline."""

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError

from actors.deadline import DeadlineError, within
from actors.deaths import is_death, sign_of_life
from actors.errors import PolicyLostError, RunError, SpoiledError, last_line
from actors.policy import CONTROL, IO
from actors.policy_calls import RankBatch, RankUpdate, ReferenceSums
from actors.recipe.upkeep import LivenessConfig
from algorithms.costs import SequenceCosts
from algorithms.losses import Normalizer
from algorithms.stats import LossStats, merge
from algorithms.types import Batch, Group, MicroBatch, Update
from sync.config import SyncConfig
from sync.member import Membership
from sync.sender import Sent
from sync.transport import Ticket

_ABORT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PolicyGroup:
    """All policy ranks; rank 0 is the first."""

    ranks: tuple[ray.actor.ActorHandle, ...]
    max_completion_length: int
    timeout_s: float
    """Deadline of one step."""
    costs: SequenceCosts = field(default_factory=SequenceCosts)
    """What the ranks are balanced by."""
    who: str = "policy"
    """Whose ranks they are, in messages."""
    team_size: int = 1
    """So many ranks that follow each other compute the same micro-batches together, and all of them say the same."""

    @property
    def num_teams(self) -> int:
        """Among how many a batch is shared out."""
        return len(self.ranks) // self.team_size

    async def start(self, timeout_s: float) -> None:
        """Load the model on every rank and join them."""
        meeting: tuple[str, int] = await _answer(
            timeout_s, self.ranks[0].address.remote(), f"reaching {self.who} rank 0"
        )
        await self._all("start", *meeting, timeout_s=timeout_s)

    async def step(self, batch: Batch, groups: Sequence[ray.ObjectRef | Group]) -> Update:
        """Train on one batch; each rank is sent only the groups that it needs, by reference."""
        return await self._complete("step", batch, groups)

    async def rest(self, batch: Batch) -> Update:
        """Complete one batch without training on it: the next version has the same weights."""
        nothing = tuple((MicroBatch(()),) for _ in range(self.num_teams))
        return await self._complete("rest", replace(batch, ranks=nothing), ())

    async def _complete(self, method: str, batch: Batch, groups: Sequence[ray.ObjectRef | Group]) -> Update:
        started = time.perf_counter()
        calls = self._calls(method, batch, groups)
        what = f"the {self.who} step at version {batch.version}"
        with _lost():
            updates: list[RankUpdate] = await _answer(self.timeout_s, asyncio.gather(*calls), what)
        assert {update.version for update in updates} == {batch.version + 1}, "only the policy counts versions, by one"
        assert len({update.skipped for update in updates}) == 1, "all ranks step, or none does"
        return _merge(batch, updates[:: self.team_size], time.perf_counter() - started)

    async def numbers(self, batch: Batch, groups: Sequence[ray.ObjectRef | Group]) -> dict[tuple[int, int], float]:
        """What each sample of the batch amounts to under the current weights, by group and rollout."""
        found: dict[tuple[int, int], float] = await self.of_each("numbers", batch, groups)
        return found

    async def references(
        self, batch: Batch, groups: Sequence[ray.ObjectRef | Group]
    ) -> dict[tuple[int, int], ReferenceSums]:
        """What the reference says of each sample of the batch, by group and rollout."""
        found: dict[tuple[int, int], ReferenceSums] = await self.of_each("references", batch, groups)
        return found

    async def of_each(
        self, method: str, batch: Batch, groups: Sequence[ray.ObjectRef | Group], what: str = ""
    ) -> dict[tuple[int, int], Any]:
        """What the ranks' `method` says of each sample of the batch, by group and rollout."""
        what = what or f"{method} of the batch at version {batch.version}"
        with _lost():
            found: list[list[list[Any]]] = await _answer(
                self.timeout_s, asyncio.gather(*self._calls(method, batch, groups)), what
            )
        return {
            (sample.group, sample.rollout): answer
            for rank, answers in zip(batch.ranks, found[:: self.team_size], strict=True)
            for micro_batch, of_samples in zip(rank, answers, strict=True)
            for sample, answer in zip(micro_batch.samples, of_samples, strict=True)
        }

    def _calls(self, method: str, batch: Batch, groups: Sequence[ray.ObjectRef | Group]) -> list[Any]:
        """Every rank is called with its team's share of the batch, and with no other groups than it needs."""
        normalizer = Normalizer.of(batch, self.max_completion_length)
        calls: list[Any] = []
        firsts = range(0, len(self.ranks), self.team_size)
        for first, micro_batches in zip(firsts, batch.ranks, strict=True):
            needed = sorted({sample.group for micro in micro_batches for sample in micro.samples})
            share = RankBatch(_renumbered(micro_batches, needed), normalizer, batch.oldest_version)
            team = self.ranks[first : first + self.team_size]
            calls += [getattr(rank, method).remote(share, *(groups[index] for index in needed)) for rank in team]
        return calls

    async def scale_learning_rate(self, factor: float) -> None:
        """From the next step on, on every rank, whatever the schedule; kept in checkpoints."""
        await self._all("scale_learning_rate", factor, timeout_s=self.timeout_s)

    @contextlib.asynccontextmanager
    async def watched(self, config: LivenessConfig) -> AsyncIterator[None]:
        """PolicyLostError, in a group, when a rank gives no sign of life while the context is open."""
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch(config), name="watch the policy")
            yield
            watch.cancel()

    async def _watch(self, config: LivenessConfig) -> NoReturn:
        for rank in itertools.cycle(range(len(self.ranks))):
            if rank == 0:
                await asyncio.sleep(config.every_s)
            call: Any = self.ranks[rank].ping.options(concurrency_group=CONTROL)
            try:
                await _answer(config.timeout_s, sign_of_life(call.remote), f"a sign of life of {self.who} rank {rank}")
            except DeadlineError as error:
                raise PolicyLostError(str(error)) from error
        raise AssertionError("a cycle has no end")

    async def plan_weights(self, dtype: str, bucket_mb: float) -> str:
        layouts: list[str] = await self._all("plan_weights", dtype, bucket_mb, timeout_s=self.timeout_s)
        return layouts[0]

    async def open_wire(self, config: SyncConfig) -> Ticket:
        """The rendezvous of a broadcast group, at rank 0."""
        opening: Any = self.ranks[0].open_wire.remote(config.transport, config.timeout_s)
        with _lost():
            ticket: Ticket = await _answer(config.timeout_s, opening, "opening the weight wire")
        return ticket

    async def join_weights(self, membership: Membership) -> None:
        """Rank 0 joins the broadcast group, the others take part in the gathers."""
        await self._all("join_weights", membership, timeout_s=membership.config.timeout_s + 10.0)

    async def abort_weights(self) -> None:
        """End a publication under way: `send_weights` fails."""
        call: Any = self.ranks[0].abort_weights.options(concurrency_group=CONTROL)
        await _answer(_ABORT_TIMEOUT_S, call.remote(), "aborting a publication")

    async def send_weights(self, timeout_s: float) -> Sent:
        sent: list[Sent] = await self._all("send_weights", timeout_s=timeout_s)
        return sent[0]

    async def snapshot(self) -> None:
        """Copy all that the next step depends on to rank 0's host; training stands still for that alone."""
        with _lost():
            await self._all("snapshot", timeout_s=self.timeout_s)

    async def write_snapshot(self, folder: Path, timeout_s: float) -> None:
        """Write the snapshot while training goes on; SpoiledError when it is none to go on from."""
        call: Any = self.ranks[0].write_snapshot.options(concurrency_group=IO)
        spoiled = await _answer(timeout_s, call.remote(folder), f"writing the {self.who}'s checkpoint")
        if spoiled is not None:
            raise SpoiledError(f"{spoiled} of the {self.who} is not finite")

    async def restore(self, folder: Path) -> None:
        """Go on from a snapshot, whatever number of ranks wrote it."""
        await self._all("restore", folder, timeout_s=self.timeout_s)

    async def save(self, folder: Path) -> None:
        await self._all("save", folder, timeout_s=self.timeout_s)

    async def _all(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        calls = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        answers: list[Any] = await _answer(timeout_s, asyncio.gather(*calls), f"{self.who} {method}")
        return answers


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """Ranks that fail in the middle of what they do together are not where they were, nor at one place."""
    try:
        yield
    except RunError as error:
        raise PolicyLostError(str(error)) from error


async def _answer(timeout_s: float, call: Awaitable[Any], what: str) -> Any:
    """What the policy answers; RunError when a rank is late or fails, PolicyLostError when it is dead.

    One that is only out of reach counts as dead, although a ping may find it well in a moment: the call was executed
    there, or it was not. It is no call to make twice (a step that is taken again is another step), and without it this
    rank may not be where the others are. All of them are at one place again at the cut.
    """
    try:
        return await within(timeout_s, call, what)
    except RayError as error:
        raise (PolicyLostError if is_death(error) else RunError)(f"{what}: {last_line(error)}") from error


def _renumbered(micro_batches: tuple[MicroBatch, ...], needed: list[int]) -> tuple[MicroBatch, ...]:
    """Samples that name their group by its place among the groups that the rank receives."""
    place = {group: index for index, group in enumerate(needed)}
    return tuple(
        MicroBatch(
            tuple(replace(s, group=place[s.group]) for s in micro.samples),
        )
        for micro in micro_batches
    )


def _merge(batch: Batch, updates: Sequence[RankUpdate], seconds: float) -> Update:
    stats = merge(LossStats.from_dict(update.stats) for update in updates)
    num_tokens = sum(s.num_tokens for micros in batch.ranks for micro in micros for s in micro.samples)
    metrics = {
        "loss": sum(update.loss for update in updates),
        "grad_norm": updates[0].grad_norm,
        "learning_rate": updates[0].learning_rate,
        "policy/learning_rate_factor": updates[0].learning_rate_factor,
        "policy/skipped": float(updates[0].skipped),
        "policy/updates": float(updates[0].num_updates),
        **stats.finish(),
        "time/policy_step_s": seconds,
        "policy_tok_per_s": num_tokens / seconds,
    }
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return Update(batch.version, batch.version + 1, finite, skipped=updates[0].skipped)
