"""No group goes to a replica that does not hold a committed version, and a replica that fails is fenced and rebuilt.

    STARTING  the engine is being built
    PENDING   it could serve, and waits for its first version
    SERVING   it holds the committed version; groups go to it
    FENCED    it failed: no group goes to it, its processes are ended, and another takes its bundle
    LEAVING   it is not wanted any more, or its machine goes: no group goes to it, and nobody takes its place

A replica's number is never used again, so nothing that an old engine says can be taken for its successor's word.

Replicas that share the policy's GPUs rest while it computes, and are built while it does not. A new one is at rest;
the next version, or its first, wakes it up.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.deadline import Clock, DeadlineError, within
from actors.deaths import sign_of_life
from actors.errors import RunError, last_line
from actors.recipe.upkeep import LivenessConfig
from actors.router import Router
from actors.turns import Turns

_CLOSE_TIMEOUT_S = 10.0
_FORGET_TIMEOUT_S = 100.0
_END_TIMEOUT_S = 3 * _CLOSE_TIMEOUT_S
_HAND_BACK_S = 30.0
"""A replica that leaves has so long to hand back what it was told to interrupt; the rest is sampled again."""


class State(Enum):
    STARTING = "starting"
    PENDING = "pending"
    SERVING = "serving"
    FENCED = "fenced"
    LEAVING = "leaving"


@dataclass(slots=True)
class Replica:
    """One inference engine, on the bundle `bundle` of the rollout pool."""

    number: int
    bundle: int
    handle: ActorHandle
    state: State = State.STARTING
    node: str = ""
    """Address of its machine, once it has started."""
    ended: bool = False
    """Its processes were ended."""


class Fleet:
    """Every replica and its state; the router knows the serving ones, and no other."""

    def __init__(
        self,
        spawn: Callable[[int, int], ActorHandle],
        num_bundles: int,
        router: Router,
        *,
        start_timeout_s: float,
        max_rebuilds: int,
        say: Callable[[str], None],
        turns: Turns | None = None,
    ) -> None:
        """Args:
        spawn: makes the actor of replica `number` on bundle `bundle`.
        max_rebuilds: how many failed replicas are replaced in a run; one more stops it.
        say: tells the user what happened.
        turns: where the replicas share the policy's GPUs.
        """
        self._spawn = spawn
        self._num_bundles = num_bundles
        self._router = router
        self._start_timeout_s = start_timeout_s
        self._max_rebuilds = max_rebuilds
        self._say = say
        self.turns = turns
        """Of those who compute on the GPUs that the replicas lie on; None where these have their own."""
        self._computed: Callable[[], None] | None = None
        """Called when the policy, for which the replicas rest, has computed."""
        self.clock = Clock()
        """By which groups have their deadlines: it stands still while the replicas rest."""
        self._numbers = count()
        self._replicas: dict[int, Replica] = {}
        self._to_rebuild: asyncio.Queue[tuple[Replica, str]] = asyncio.Queue()
        self._changed = asyncio.Event()
        self.num_rebuilt = self.num_joined = self.num_left = 0
        self.is_gone: Callable[[int], Awaitable[bool]] | None = None
        """Whether the machine of a bundle is gone; then who was on it leaves, and that is no failure of his. RunError
        where the run cannot go on without it."""
        self._ping_timeout_s = LivenessConfig().timeout_s
        self.serves_since = 0.0
        """The time.monotonic() at which, after none had served, one did."""

    @property
    def members(self) -> list[Replica]:
        """The replicas that take part in a publication."""
        return [r for r in self._replicas.values() if r.state in (State.PENDING, State.SERVING)]

    @property
    def pending(self) -> list[Replica]:
        return [replica for replica in self._replicas.values() if replica.state is State.PENDING]

    @property
    def shares(self) -> bool:
        """Whether the replicas lie on the policy's GPUs."""
        return self.turns is not None

    @property
    def num_serving(self) -> int:
        return sum(replica.state is State.SERVING for replica in self._replicas.values())

    def on(self, bundle: int) -> Replica | None:
        """Who is on the bundle; a fenced one until its successor is."""
        return next((replica for replica in self._replicas.values() if replica.bundle == bundle), None)

    def is_leaving(self, number: int) -> bool:
        """Whether the replica has been told to leave."""
        replica = self._replicas.get(number)
        return replica is not None and replica.state is State.LEAVING

    def is_fenced(self, number: int) -> bool:
        """Whether the replica has failed, or is gone; it may have a successor."""
        replica = self._replicas.get(number)
        return replica is None or replica.state is State.FENCED

    @property
    def rebuilding(self) -> bool:
        """Whether no replica serves, and one is about to: it is built, or waits for its version."""
        states = {replica.state for replica in self._replicas.values()}
        return State.SERVING not in states and bool(states & {State.STARTING, State.PENDING, State.FENCED})

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until a change of some replica's state makes the condition true; the caller sets the deadline, if any."""
        while not condition():
            await self._changed.wait()

    async def start(self) -> None:
        """Build one replica on each bundle; the first that cannot start stops the run: nothing was lost yet."""
        replicas = [self._place(bundle) for bundle in range(self._num_bundles)]
        async with asyncio.TaskGroup() as starts:
            for replica in replicas:
                starts.create_task(self._build(replica))

    def serve(self, replicas: Iterable[Replica]) -> None:
        """These hold the committed version."""
        if self.num_serving == 0:
            self.serves_since = time.monotonic()
        for replica in replicas:
            if replica.state is State.PENDING:
                replica.state = State.SERVING
                self._router.join(replica.number, replica.handle)
        self._wake()

    def fence(self, number: int, cause: str) -> None:
        """Take the replica out; it is rebuilt while `supervised`. A replica that is out already stays so."""
        replica = self._replicas.get(number)
        if replica is None or replica.state in (State.FENCED, State.LEAVING):
            return
        if replica.state is State.SERVING:
            self._router.leave(number)
        replica.state = State.FENCED
        self._say(f"warning: rollout replica {number} is fenced and will be rebuilt: {cause}")
        self._to_rebuild.put_nowait((replica, cause))
        self._wake()

    async def join(self, bundle: int) -> None:
        """One replica more, on a bundle that nobody is on; it serves once it holds the committed version."""
        replica = self._place(bundle)
        self.num_joined += 1
        self._say(f"rollout replica {replica.number} joins")
        await self._built(replica)

    async def leave(self, number: int, grace_s: float, cause: str) -> None:
        """The replica ends its groups within the grace; the others go on elsewhere, with the tokens that they have."""
        replica = self._replicas.get(number)
        if replica is None or replica.state is State.LEAVING:
            return
        served, replica.state = replica.state is State.SERVING, State.LEAVING
        self.num_left += 1
        self._say(f"rollout replica {number} leaves: {cause}")
        if served:
            self._router.leave(number)
        self._wake()
        if served and not await self._emptied(replica, grace_s):
            with contextlib.suppress(RayError, RunError):
                await within(_HAND_BACK_S, replica.handle.interrupt.remote(None), "interrupting a replica that leaves")
            await self._emptied(replica, _HAND_BACK_S)
        await self._end(replica)
        self._replicas.pop(number, None)
        self._wake()

    async def _emptied(self, replica: Replica, timeout_s: float) -> bool:
        """Whether it holds no group any more, in time."""
        try:
            await within(timeout_s, self._router.emptied(replica.number), "the groups of a replica that leaves")
        except DeadlineError:
            return False
        return True

    async def forget(self) -> None:
        """No replica holds a version any more: each waits for its first one again, its engine as it is."""
        members = self.members
        for replica in members:
            if replica.state is State.SERVING:
                self._router.leave(replica.number)
                replica.state = State.PENDING
        await self._each(members, "forget", _FORGET_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def resting(self, timeout_s: float = _FORGET_TIMEOUT_S) -> AsyncIterator[None]:
        """Whoever shares the policy's GPUs leaves them to it until it has computed, and samples from the next version
        on; nothing where nobody does. A replica that does not come to rest in time is fenced."""
        if self.turns is None:
            yield
            return
        async with self.turns.computing() as computed:
            self._computed = computed
            await self._each(self.members, "rest", timeout_s)
            gone = self.wait_for(lambda: all(r.ended for r in self._replicas.values() if r.state is State.FENCED))
            await within(_END_TIMEOUT_S, gone, "ending engines that share the policy's GPUs")
            self.clock.stop()
            try:
                yield
            finally:
                self.clock.start()

    def computed(self) -> None:
        """The policy is done with the GPUs that it shares: engines may be built on them again."""
        if self._computed is not None:
            self._computed()

    @contextlib.asynccontextmanager
    async def computing(self) -> AsyncIterator[None]:
        """Replicas go on, but none is built, on GPUs that they share; nothing where nobody does."""
        if self.turns is None:
            yield
            return
        async with self.turns.computing():
            yield

    @contextlib.asynccontextmanager
    async def supervised(self, liveness: LivenessConfig | None = None) -> AsyncIterator[None]:
        """Fenced replicas, and those that give no sign of life, are replaced while the context is open."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._supervise(), name="fleet")]
            if liveness is not None:
                self._ping_timeout_s = liveness.timeout_s
                running.append(tasks.create_task(self._watch(liveness), name="fleet-watch"))
            yield
            for task in running:
                task.cancel()

    async def close(self) -> None:
        """End all engines, and the processes that they have started."""
        await asyncio.gather(*(self._end(replica) for replica in self._replicas.values()))

    async def _supervise(self) -> None:
        async with asyncio.TaskGroup() as rebuilds:
            while True:
                replica, cause = await self._to_rebuild.get()
                rebuilds.create_task(self._replace(replica, cause), name=f"rebuild-{replica.number}")

    async def _replace(self, replica: Replica, cause: str) -> None:
        """Another takes its bundle, if there is a machine to have it."""
        if self.is_gone is not None and await self.is_gone(replica.bundle):
            await self.leave(replica.number, 0.0, "its machine is gone")
        if replica.state is State.LEAVING:
            return
        self.num_rebuilt += 1
        if self.num_rebuilt > self._max_rebuilds:
            raise RunError(
                f"rollout replica {replica.number} failed ({cause}), and rollout.max_rebuilds allows "
                f"{self._max_rebuilds} replacements in a run"
            )
        await self._rebuild(replica)

    async def _watch(self, liveness: LivenessConfig) -> None:
        while True:
            await asyncio.sleep(liveness.every_s)
            await self._ping(self.members)

    async def look_after(self, number: int) -> None:
        """Of a replica that is out of reach: it is fenced, unless it gives a sign of life in time."""
        await self._ping([replica for replica in self.members if replica.number == number])

    async def _ping(self, replicas: Sequence[Replica]) -> None:
        await self._came(replicas, "ping", [sign_of_life(r.handle.ping.remote) for r in replicas], self._ping_timeout_s)

    async def _each(self, replicas: Sequence[Replica], method: str, timeout_s: float) -> None:
        """Call the method of every replica; one that fails or is late is fenced."""
        await self._came(replicas, method, [getattr(r.handle, method).remote() for r in replicas], timeout_s)

    async def _came(
        self, replicas: Sequence[Replica], method: str, calls: Sequence[Awaitable[object]], timeout_s: float
    ) -> None:
        waits = (within(timeout_s, call, f"{method} of the engine") for call in calls)
        answers = await asyncio.gather(*waits, return_exceptions=True)
        for replica, answer in zip(replicas, answers, strict=True):
            match answer:
                case RayError() | RunError():
                    self.fence(replica.number, last_line(answer))
                case BaseException():
                    raise answer

    async def _rebuild(self, old: Replica) -> None:
        await self._end(old)
        if old.state is State.LEAVING:
            return  # it was told to meanwhile, and nobody takes its place
        del self._replicas[old.number]
        await self._built(self._place(old.bundle))

    async def _built(self, new: Replica) -> None:
        """A replica that cannot start is fenced."""
        try:
            await self._build(new)
        except RunError as error:
            self.fence(new.number, str(error))

    def _place(self, bundle: int) -> Replica:
        number = next(self._numbers)
        replica = self._replicas[number] = Replica(number, bundle, self._spawn(number, bundle))
        return replica

    async def _build(self, replica: Replica) -> None:
        what = f"rollout replica {replica.number}"
        async with contextlib.nullcontext() if self.turns is None else self.turns.building():
            try:
                replica.node = await within(self._start_timeout_s, replica.handle.start.remote(), f"starting {what}")
            except RayError as error:
                raise RunError(f"{what} could not start: {last_line(error)}") from error
        if replica.state is State.STARTING:
            replica.state = State.PENDING
            self._wake()

    async def _end(self, replica: Replica) -> None:
        """Let the engine end its processes; then end the actor, whether it answered or not."""
        with contextlib.suppress(RayError, RunError):
            await within(_CLOSE_TIMEOUT_S, replica.handle.close.remote(), f"closing replica {replica.number}")
        ray.kill(replica.handle)
        replica.ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
