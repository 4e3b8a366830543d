"""The schedule is the pacer's and the router's own: what is simulated is only how long things take.

    produce: slot -> replica -> sequences decode -> scores -> pacer      learn: batch -> training -> publication

Two clocks. World time is the result's. Generation time stands still while an in-flight update pauses all replicas, or
the policy trains on GPUs that they share, so a pause costs one addition, not a visit to every sequence. Everything that
happens at one moment is handled before the pacer is asked what may start.
"""

import random
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import inf
from typing import Literal, Protocol

from algorithms.pacing import Pacer
from algorithms.routing import Router
from algorithms.simulation.config import SimulationConfig
from algorithms.simulation.lengths import Lengths, Trace
from algorithms.simulation.replicas import Fleet, Group
from algorithms.simulation.result import SimulationResult, critic_seconds, train_s
from algorithms.simulation.setup import Setup
from algorithms.simulation.tally import Tally
from algorithms.slots import Slot, Taken

_MAX_FAILURES_A_STEP = 1000
"""A step during which every replica fails this often will never end."""

Stage = Literal["waiting", "valuing", "training", "streaming", "swapping", "outlasted"]
"""What the policy does: waits for a batch, for the critic's values of it, trains on it, streams its weights, waits
until all replicas have swapped, and then for the end of the critic's step."""

_BOOKED: dict[Stage, str] = {
    "valuing": "critic", "training": "training", "streaming": "publishing", "swapping": "publishing",
    "outlasted": "critic",
}  # fmt: skip
"""What the policy's time counts as; that of waiting for a batch, as the pacer says."""


class Scheduler(Protocol):
    """What is asked of algorithms.pacing.Pacer, and of another system's rule that is compared with it."""

    next_version: int
    max_in_flight: int

    @property
    def left_out_cause(self) -> str: ...
    def blocked(self, version: int) -> str | None: ...
    def waiting(self) -> str | None: ...
    def dispatch(self, version: int) -> Slot | None: ...
    def take(self) -> Taken | None: ...
    def finished(self, slot: Slot, oldest_version: int, newest_version: int) -> bool: ...
    def failed(self, slot: Slot) -> bool: ...
    def dropped(self, slot: Slot) -> bool: ...
    def leftover(self) -> Sequence[int]: ...


def simulate(
    config: SimulationConfig,
    setup: Setup,
    trace: Trace = (),
    on_step: Callable[[int], None] | None = None,
    pacer: Scheduler | None = None,
) -> SimulationResult:
    """What a run would do; the same arguments give the same result.

    `trace`: the groups that `lengths: {kind: trace}` draws from. `on_step` is told the number of steps done. `pacer`
    decides in place of the one that `setup` describes; what it trains of versions older than `setup.max_staleness`
    allows counts as masked. ValueError when the run would never end, or when the trace is empty.
    """
    return _Simulation(config, setup, trace, pacer).run(on_step)


class _Simulation:
    def __init__(self, config: SimulationConfig, setup: Setup, trace: Trace, pacer: Scheduler | None) -> None:
        self.config, self.setup = config, setup
        self.lengths = Lengths(config.lengths, setup.num_generations, setup.max_completion_length, config.seed, trace)
        self.random = random.Random(config.seed)
        self.pacer: Scheduler = pacer or Pacer(
            groups_per_batch=setup.groups_per_batch,
            max_staleness=setup.max_staleness,
            num_batches=setup.steps,
            when_stale=setup.when_stale,
            over_sampling=setup.over_sampling,
            pipeline_depth=setup.pipeline_depth,
            max_in_flight=setup.max_in_flight,
        )
        self.router = Router(setup.max_groups_per_replica)
        self.expected_length = float(setup.max_completion_length)
        """Running mean of a completion's tokens, by which the router is told what a group will be."""
        self.fleet = Fleet(setup.num_replicas, setup.max_num_seqs, config.decode.base_s, config.decode.per_sequence_s)
        self.tally = Tally(setup.max_staleness)
        self.groups: dict[int, Group] = {}
        """By ordinal: in flight or ready."""
        self.now = 0.0
        self.booked_until = 0.0
        self.busy_s = self.held_s = 0.0
        """Slot-seconds since then: decoding, and kept free for a swap."""
        self.paused_s = 0.0
        """World time minus generation time, as long as nothing is paused."""
        self.paused_at: float | None = None
        """The generation time at which it stands still."""
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        self.version = 0
        """The version that was committed last."""
        self.stage: Stage = "waiting"
        self.critic_until = 0.0
        """When its step ends."""
        self.failures_in_step = 0
        self.changed = True
        """Something has happened that the pacer may answer to."""
        self.blocked, self.waiting = "capacity", "groups"
        for replica in range(setup.num_replicas):
            self.router.join(replica)
            self.expect_failure(replica)

    def run(self, on_step: Callable[[int], None] | None) -> SimulationResult:
        done = 0
        while self.version < self.setup.steps or self.stage == "outlasted":
            self.advance()
            if self.version > done:
                done = self.version
                if on_step is not None:
                    on_step(done)
        self.book()
        for group in self.groups.values():
            self.fleet.stop(group, self.generation_time())
        return self.tally.result(
            self.config, self.setup, self.now, len(self.pacer.leftover()), list(self.groups.values())
        )

    # Time --------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """The next thing that happens; when nothing more happens at this moment, the pacer answers first."""
        fleet = self.fleet
        decoded_at = fleet.next_due() + self.paused_s if self.paused_at is None else inf
        event_at = self.events[0][0] if self.events else inf
        at = decoded_at if decoded_at <= event_at else event_at
        if at > self.now:
            if self.changed:
                self.react()
                return
            assert at < inf, "the schedule has come to a stop"
            self.busy_s += (at - self.now) * fleet.num_running
            self.held_s += (at - self.now) * fleet.num_held
            self.now = at
        if decoded_at <= event_at:
            for group in fleet.finish_due():
                self.score(group)
            while fleet.drained:
                self.drained(fleet.drained.pop())
        else:
            self.book()
            heappop(self.events)[2]()

    def book(self) -> None:
        """Book the time since the last call on every slot and on the policy; what they did has not changed since."""
        seconds = self.now - self.booked_until
        self.booked_until = self.now
        if seconds == 0.0:
            return
        stage, tally, idle = self.stage, self.tally, self.tally.slot_idle_s
        tally.policy_s[self.waiting if stage == "waiting" else _BOOKED[stage]] += seconds
        alive = self.fleet.num_alive * self.setup.max_num_seqs
        if alive < self.setup.num_slots:
            idle["failed"] += seconds * (self.setup.num_slots - alive)
        if self.paused_at is not None:
            idle["publishing" if stage == "swapping" else "turns"] += seconds * alive
        else:
            tally.busy_s += self.busy_s
            idle["publishing"] += self.held_s
            idle[self.blocked] += seconds * alive - self.busy_s - self.held_s
        self.busy_s = self.held_s = 0.0

    def generation_time(self) -> float:
        return self.now - self.paused_s if self.paused_at is None else self.paused_at

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.num_events += 1
        heappush(self.events, (self.now + seconds, self.num_events, event))

    # The two coroutines of the controller ------------------------------------------------------------------------

    def react(self) -> None:
        """Let the policy take a batch and the replicas take groups, as far as the pacer allows."""
        self.book()
        self.changed = False
        pacer = self.pacer
        if self.stage == "waiting":
            self.take()
            self.waiting = pacer.waiting() or "groups"
        while (slot := pacer.dispatch(self.version)) is not None:
            # As actors/router.py estimates it.
            expected = self.config.prompt_length + round(self.setup.num_generations * self.expected_length)
            replica = self.router.assign(expected)
            assert replica is not None, "the pacer lets no more groups out than the replicas hold"
            group = Group(slot, self.lengths.draw(slot.ordinal, slot.attempt), replica, expected)
            self.groups[slot.ordinal] = group
            self.tally.dispatched(group)
            self.fleet.start(group, self.generation_time())
        self.blocked = pacer.blocked(self.version) or "capacity"

    def take(self) -> None:
        version = self.pacer.next_version
        taken = self.pacer.take()
        if taken is None:
            return
        num_tokens = 0
        for ordinal in taken.batch:
            group = self.groups.pop(ordinal)
            num_tokens += sum(group.lengths) + len(group.lengths) * self.config.prompt_length
            self.tally.trained(group, version)
        for slot in taken.requeued:
            group = self.groups.pop(slot.ordinal)
            self.abort(group)
            self.tally.wasted(group, "requeued")
        for ordinal in taken.left_out:
            self.tally.left_out(self.groups.pop(ordinal), self.pacer.left_out_cause)
        self.changed = True
        values_s, critic_s = critic_seconds(self.config, self.setup, num_tokens)
        self.critic_until = self.now + values_s + critic_s
        if self.setup.num_critic_workers:
            self.stage = "valuing"
            self.after(values_s, lambda: self.train(num_tokens))
        else:
            self.train(num_tokens)

    def train(self, num_tokens: int) -> None:
        self.stage = "training"
        if self.setup.takes_turns:
            self.paused_at = self.generation_time()
        self.after(train_s(self.config, self.setup, num_tokens), self.trained)

    # Groups ------------------------------------------------------------------------------------------------------

    def score(self, group: Group) -> None:
        """All sequences are sampled; the rewards come later."""
        reward = self.config.reward
        if reward.mean_s == 0.0:
            self.scored(group)
            return
        seconds = reward.mean_s if reward.kind == "constant" else self.random.expovariate(1.0 / reward.mean_s)
        self.after(seconds, lambda: self.scored(group))

    def scored(self, group: Group) -> None:
        ordinal = group.slot.ordinal
        if self.groups.get(ordinal) is not group:
            return  # aborted, or lost with its replica
        self.fleet.leave(group)
        self.router.done(group.replica, group.expected_tokens)
        self.expected_length += 0.05 * (sum(group.lengths) / len(group.lengths) - self.expected_length)
        self.changed = True
        if self.config.filtered_share and self.random.random() < self.config.filtered_share:
            self.pacer.dropped(group.slot)
            self.tally.left_out(self.groups.pop(ordinal), "filtered")
            return
        self.pacer.finished(group.slot, min(group.tokens), max(group.tokens))

    def abort(self, group: Group) -> None:
        """Stop an attempt, unless it has been scored already."""
        if self.fleet.stop(group, self.generation_time()):
            self.router.done(group.replica, group.expected_tokens)

    # Weight versions ---------------------------------------------------------------------------------------------

    def trained(self) -> None:
        """The step is done; its weights stream to the replicas while they generate."""
        self.stage = "streaming"
        sync = self.config.sync
        self.after(sync.total_s - sync.pause_s, self.streamed)

    def streamed(self) -> None:
        """Every replica holds the new weights whole; now they swap."""
        self.stage = "swapping"
        if self.setup.in_flight_updates:
            self.paused_at = self.generation_time()
            self.after(self.config.sync.pause_s, self.swapped)
            return
        for replica in self.fleet.alive():
            self.fleet.hold(replica)
        while self.fleet.drained:
            self.drained(self.fleet.drained.pop())
        self.commit_when_all_have_swapped()

    def swapped(self) -> None:
        """All replicas go on together under the new version."""
        assert self.paused_at is not None
        self.fleet.swap_all(self.paused_at)
        if self.config.sync.pause_s or self.setup.takes_turns:
            self.paused_s = self.now - self.paused_at
        self.paused_at = None
        self.commit()

    def drained(self, replica: int) -> None:
        version = self.version
        self.after(self.config.sync.pause_s, lambda: self.swap_alone(replica, version))

    def swap_alone(self, replica: int, version: int) -> None:
        """A replica that was let finish its sequences swaps, and goes on before the others do."""
        if self.fleet.holds(replica, version):
            self.fleet.swap(replica, self.now)
            self.commit_when_all_have_swapped()

    def commit_when_all_have_swapped(self) -> None:
        if self.stage == "swapping" and not self.setup.in_flight_updates and self.fleet.num_holding == 0:
            self.commit()

    def commit(self) -> None:
        self.version += 1
        self.stage, self.changed, self.failures_in_step = "waiting", True, 0
        self.tally.step(self.now, self.setup.num_slots)
        if self.critic_until > self.now:
            self.stage = "outlasted"
            self.after(self.critic_until - self.now, self.critic_done)

    def critic_done(self) -> None:
        """The next batch may be taken."""
        self.stage, self.changed = "waiting", True

    # Failures ----------------------------------------------------------------------------------------------------

    def expect_failure(self, replica: int) -> None:
        mean_s = self.config.failures.mean_between_s
        if mean_s is not None:
            self.after(self.random.expovariate(1.0 / mean_s), lambda: self.fail(replica))

    def fail(self, replica: int) -> None:
        self.failures_in_step += 1
        if self.failures_in_step > _MAX_FAILURES_A_STEP * self.setup.num_replicas:
            raise ValueError(
                f"simulation.failures.mean_between_s: {self.config.failures.mean_between_s:g} s is too short for a "
                "replica to finish groups before it dies, so the run would never end; raise it"
            )
        self.tally.num_failures += 1
        for group in self.fleet.fail(replica, self.generation_time()):
            del self.groups[group.slot.ordinal]
            self.pacer.failed(group.slot)
            self.tally.wasted(group, "failed")
        self.router.leave(replica)
        self.resize()
        self.after(self.config.failures.recovery_s, lambda: self.recover(replica))
        self.commit_when_all_have_swapped()

    def recover(self, replica: int) -> None:
        """A new replica takes the number; where the others are swapping one by one, it begins with the new version."""
        alone = self.stage == "swapping" and not self.setup.in_flight_updates
        self.fleet.recover(replica, self.version + alone, self.generation_time())
        self.router.join(replica)
        self.resize()
        self.expect_failure(replica)

    def resize(self) -> None:
        self.pacer.max_in_flight = self.fleet.num_alive * self.setup.max_groups_per_replica
        self.changed = True
