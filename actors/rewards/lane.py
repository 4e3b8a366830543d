"""Every visit to a child gets its outcomes; each call of it has its own deadline, and no wait is without one.

One thread starts the child and speaks to it, for the kernel ends a child with the thread that started it; it lives
until the lane is closed, and asks no one but the child.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from actors.recipe.rewards import CANCEL_GRACE_S, LOAD_TIMEOUT_S
from actors.rewards.docket import Docket, Outcome, Visit
from actors.rewards.functions import MEMORY
from actors.rewards.process import WROTE_INTO_PIPE, ChildError, RewardProcess

_HELD_SHARE = 0.1
"""A call that is late, and was not alone, is asked again alone when somebody held the child for this share of its time,
or more."""
_IDLE_S = 60.0
_CLOSE_TIMEOUT_S = 15.0


@dataclass(slots=True)
class _Asked:
    """One call on its way."""

    visit: Visit
    deadline: float
    """time.monotonic(); of the cancellation, when there was one."""
    is_cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Told:
    """What the child says of one call."""

    number: int
    visit: Visit
    found: dict[int, Outcome]
    was_held: bool
    """Somebody held the child for long while it was in flight; told of those alone that were cut off."""
    is_stuck: bool
    """It was cut off and has not ended."""


class Lane:
    """A child process and the visits to it: `width` at a time when all of its functions are async, else one."""

    def __init__(
        self,
        functions: tuple[str, ...],
        timeout_s: float,
        width: int,
        columns: tuple[str, ...] | None = None,
        max_memory_gb: float | None = None,
    ) -> None:
        self.news: deque[str] = deque()
        """What somebody should be told, once."""
        self._process = RewardProcess(functions, columns, max_memory_gb)
        self._timeout_s = timeout_s
        self._most = width
        self._width = 1  # that was last told
        self._docket = Docket(1)
        self._asked: dict[int, _Asked] = {}
        self._num_calls = 0
        self._inbox: SimpleQueue[Visit | Future[tuple[bool, ...]]] = SimpleQueue()
        self._wake_reads, self._wake_writes = os.pipe()
        os.set_blocking(self._wake_reads, False)
        os.set_blocking(self._wake_writes, False)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="reward lane", daemon=True)
        self._thread.start()

    def load(self) -> Future[tuple[bool, ...]]:
        """Which functions are async, when a child has loaded them all; ChildError when it cannot."""
        loaded: Future[tuple[bool, ...]] = Future()
        self._put(loaded)
        return loaded

    def ask(self, steps: Sequence[Sequence[int]], arguments: str, num_completions: int) -> Future[dict[int, Outcome]]:
        """The outcomes of these functions for one group; until `load` has been asked for, one group goes at a time."""
        visit = Visit(tuple(map(tuple, steps)), arguments, num_completions)
        self._put(visit)
        return visit.answer

    def close(self) -> None:
        """End the child with all that is in flight; nobody is answered after this, but told so."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.interrupt()
        self._wake()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self._wake_reads)
            os.close(self._wake_writes)

    @property
    def lives(self) -> bool:
        """Its thread is there, or was ended by `close`."""
        return self._is_closed or self._thread.is_alive()

    def _put(self, one: Visit | Future[tuple[bool, ...]]) -> None:
        self._inbox.put(one)
        if self._is_closed or not self._thread.is_alive():
            self._tell_the_rest()
        else:
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is full of reasons to wake
            os.write(self._wake_writes, b"!")

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._take()
                self._begin()
                self._exchange()
                self._keep_deadlines()
                self._tell_of_its_width()
        finally:
            self._process.kill()
            self._tell_the_rest()

    def _tell_the_rest(self) -> None:
        waiting: list[Future[Any]] = [visit.answer for visit in self._docket.everyone()]
        waiting += [one.answer if isinstance(one, Visit) else one for one in self._asked_for()]
        for answer in waiting:
            with suppress(InvalidStateError):
                answer.set_exception(RuntimeError("the reward actor is closed"))

    def _asked_for(self) -> Iterator[Visit | Future[tuple[bool, ...]]]:
        """Since the last time."""
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()

    def _take(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_reads, 4096)
        loads = []
        for one in self._asked_for():
            if isinstance(one, Visit):
                self._docket.add(one)
            else:
                loads.append(one)
        if loads:
            self._load(loads)

    def _load(self, loads: Sequence[Future[tuple[bool, ...]]]) -> None:
        try:
            if not self._process.is_async:
                self._start()
        except BaseException as error:
            for loaded in loads:  # whoever waits is told, whatever it was
                with suppress(InvalidStateError):
                    loaded.set_exception(error)
            if isinstance(error, ChildError):
                return
            raise
        for loaded in loads:
            with suppress(InvalidStateError):
                loaded.set_result(self._process.is_async)

    def _start(self) -> None:
        """There is a child that has loaded the functions; ChildError when there cannot be one."""
        is_first = not self._process.is_async
        self._process.start(LOAD_TIMEOUT_S)
        if is_first and self._process.is_together:
            self._docket.width = self._width = self._most

    def _begin(self) -> None:
        """Whatever may be begun now; a failed child is replaced first."""
        begun = []
        while (visit := self._docket.next()) is not None:
            if visit.answer.cancelled():  # nobody waits for it any more
                self._docket.done(visit, in_time=False)
            else:
                begun.append(visit)
        if not begun:
            return
        try:
            if len(begun) == len(self._docket.in_flight):  # else the end of a child is told by its pipe
                self._start()
        except ChildError as error:
            for visit in begun:
                self._docket.done(visit, in_time=False)
                visit.outcomes |= _failed(visit, [place for step in visit.steps for place in step], error)
                self._finish(visit)
            return
        for visit in begun:
            self._ask(visit)

    def _ask(self, visit: Visit) -> None:
        self._num_calls += 1
        now = time.monotonic()
        head = f'"id": {self._num_calls}, "asked_at": {now!r}, "functions": {list(visit.step)}'
        self._process.post(f'{{{head}, "arguments": {visit.arguments}}}'.encode())
        self._asked[self._num_calls] = _Asked(visit, now + self._timeout_s)

    def _exchange(self) -> None:
        """Send what is to be sent, and take what has come, or wait for it until the next deadline."""
        now = time.monotonic()
        first = min((asked.deadline for asked in self._asked.values()), default=now + _IDLE_S)
        try:
            answers = self._process.exchange(min(first - now, _IDLE_S), self._wake_reads)
        except ChildError as error:
            self._ended(error)
            return
        for answer in answers:
            try:
                told = self._told(answer)
            except (KeyError, TypeError, ValueError):
                self._ended(self._process.ended("died", WROTE_INTO_PIPE))
                return
            self._answered(told)
            if not self._asked:  # nobody waits for what else came of a child that had to be ended
                return

    def _told(self, answer: Any) -> _Told:
        """KeyError and the like when it is no answer to what was asked."""
        visit = self._asked[answer["id"]].visit
        outcomes = [Outcome(tuple(r["scores"]), r["cause"], r["detail"]) for r in answer["results"]]
        was_held = answer.get("held_s", 0.0) >= _HELD_SHARE * self._timeout_s
        found = dict(zip(visit.step, outcomes, strict=True))
        return _Told(answer["id"], visit, found, was_held, bool(answer.get("stuck")))

    def _answered(self, told: _Told) -> None:
        """One call has ended, by itself or because it was cut off."""
        visit = told.visit
        late = [place for place, outcome in told.found.items() if outcome.cause == "timeout"]
        if late and told.was_held and not self._docket.is_alone(visit):
            if told.is_stuck:
                self._ended(self._process.ended("timeout", self._late))
            else:
                del self._asked[told.number]
                self._docket.cut_off(visit)
            return
        visit.outcomes |= told.found | _failed(visit, late, ChildError("timeout", self._late))
        if told.is_stuck:
            self._process.kill()
            self._asked.clear()
            self._docket.ended_by(visit)
            self._finish(visit)
            return
        del self._asked[told.number]
        if not self._process.is_together and any(outcome.cause == MEMORY for outcome in told.found.values()):
            self._process.kill()  # what a function keeps would leave the next call too little
            self._docket.ended_by(visit)
            if visit.step:
                self._docket.again(visit)
            else:
                self._finish(visit)
        elif visit.step:
            self._ask(visit)
        else:
            self._docket.done(visit, in_time=not late)
            self._finish(visit)

    def _keep_deadlines(self) -> None:
        """Calls beyond their deadline are cut off; a child that does not do that, or cannot, is killed."""
        now = time.monotonic()
        for number, asked in self._asked.items():
            if now < asked.deadline:
                continue
            if self._process.has_exited:
                self._ended(self._process.ended("died", self._late))
                return
            if asked.is_cancelled or not self._process.is_together:
                self._ended(self._process.ended("timeout", self._late))
                return
            self._process.post(json.dumps({"cancel": number}).encode())
            asked.is_cancelled, asked.deadline = True, now + CANCEL_GRACE_S

    def _ended(self, error: ChildError) -> None:
        """There is no child any more: the one that was in flight has this failure, or each of many is asked again."""
        self._asked.clear()
        culprit = self._docket.ended(held=error.cause == "timeout")
        if culprit is None or self._is_closed:
            self._docket.in_flight += [culprit] if culprit else []  # to be told with the rest
            return
        culprit.outcomes |= _failed(culprit, culprit.step, error)
        if culprit.step:
            self._docket.again(culprit)
        else:
            self._finish(culprit)

    def _tell_of_its_width(self) -> None:
        if self._docket.width < self._width:
            self._width = self._docket.width
            self.news.append(
                "reward functions hold their process without awaiting anything, so that others are late: this worker "
                f"calls them for at most {self._width} group{'s' * (self._width > 1)} at a time from now on"
            )

    @property
    def _late(self) -> str:
        return f"took more than {self._timeout_s:g} s"

    @staticmethod
    def _finish(visit: Visit) -> None:
        with suppress(InvalidStateError):  # nobody waits any more
            visit.answer.set_result(visit.outcomes)


def _failed(visit: Visit, places: Sequence[int], error: ChildError) -> dict[int, Outcome]:
    """The same failure for some functions, but for those that have been called before."""
    nothing = (None,) * visit.num_completions
    return {place: Outcome(nothing, error.cause, str(error)) for place in places if place not in visit.outcomes}
