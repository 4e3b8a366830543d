"""Calls of async functions run side by side in one event loop, and are answered as they end, in any order.

What one call may see of another that is in flight at the same time is all that belongs to the process. Variables of
modules, the environment and seeds reach the next call when calls come one after another, too; here they reach those
beside it, and so do the folder and the timer (put back whenever a call begins or ends, under the feet of the others),
the loop with its tasks, and the time while a call holds the loop and awaits nothing. How long it was held is told with
each call that is cut off, so that nobody is blamed for the time of another. What a call leaves in the loop goes on.

A loop that ends (a task raised SystemExit, or somebody stopped it) is the failure of the call in flight when there is
one; when there are several nobody knows whose it is, and the process ends: the parent asks each again alone.
"""

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from actors.rewards.call import Raised, RewardFunction, file_of, keywords, raised, result_of
from actors.rewards.functions import describe
from actors.rewards.pipe import Inbox, Outbox, send

_TICK_S = 0.25
_HELD_S = 0.1
"""A loop that comes back this much too late was held."""
_STUCK_S = 1.0
"""A call that was cancelled has this long to end: less than CANCEL_GRACE_S, after which the parent kills us all."""


@dataclass(eq=False, slots=True)
class _Call:
    number: int
    num_completions: int
    held_before_s: float
    functions: list[RewardFunction]
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    late: frozenset[int] = frozenset()
    """The places of the functions that were cut off."""
    held_s: float = 0.0
    """For how long of its time, until then, somebody held the loop."""


class Together:
    """Serves requests until the parent closes the pipe; then the process ends, whatever is in flight."""

    def __init__(self, request_fd: int, response_fd: int, functions: list[RewardFunction]) -> None:
        self._inbox = Inbox(request_fd)
        self._outbox = Outbox(response_fd)
        self._functions = functions
        self._folder = os.getcwd()
        self._pid = os.getpid()
        self._calls: dict[int, _Call] = {}
        self._held_s = 0.0
        self._tick_due = 0.0
        os.register_at_fork(after_in_child=self._forked)

    def serve(self) -> None:
        """Never returns."""
        while True:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            self._loop.add_reader(self._inbox.descriptor, self._guarded, self._read)
            self._tick_due = time.monotonic()
            self._tick()
            try:
                self._loop.run_forever()
                detail = "RuntimeError: the event loop was stopped"
            except BaseException as error:  # noqa: BLE001 - raised by a task that a function left behind
                detail = describe(error)
            self._broken(detail)

    def _guarded(self, act: Any, *arguments: Any) -> None:
        """Ours, called by the loop: the loop would go on after an error, and the call would never be answered."""
        try:
            act(*arguments)
        except BaseException:  # noqa: BLE001 - a function has broken what we use
            os._exit(1)

    # Requests ----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            messages = self._inbox.read()
        except EOFError:
            os._exit(0)
        for message in messages:
            request = json.loads(message)
            if "cancel" in request:
                self._cancel(request["cancel"])
            else:
                self._begin(request, message)

    def _begin(self, request: dict[str, Any], message: bytes) -> None:
        self._reset()
        functions = [self._functions[index] for index in request["functions"]]
        num_completions = len(request["arguments"]["completions"])
        # Its time runs since it was asked, and so does the time for which others held the loop.
        before_s = self._held_until_now_s() - (time.monotonic() - request["asked_at"])
        call = _Call(request["id"], num_completions, before_s, functions)
        self._calls[call.number] = call
        for function in functions:
            # Every function has arguments of its own, so none sees what another has changed.
            task = self._loop.create_task(_output(function, keywords(json.loads(message)["arguments"])))
            call.tasks.append(task)
            task.add_done_callback(partial(self._guarded, self._done, call))

    def _cancel(self, number: int) -> None:
        """Cut a call off; one that has been answered meanwhile is left alone."""
        call = self._calls.get(number)
        if call is None:
            return
        call.late = frozenset(place for place, task in enumerate(call.tasks) if not task.done())
        call.held_s = self._held_until_now_s() - call.held_before_s
        for place in call.late:
            call.tasks[place].cancel()
        self._loop.call_later(_STUCK_S, self._guarded, self._give_up, call)

    def _give_up(self, call: _Call) -> None:
        """It took no notice of its cancellation: the parent ends this process."""
        if call.number in self._calls:
            self._answer(call, stuck=True)

    # Answers -----------------------------------------------------------------------------------------------------

    def _done(self, call: _Call, _: asyncio.Task[Any]) -> None:
        if call.number in self._calls and all(task.done() for task in call.tasks):
            self._answer(call)

    def _answer(self, call: _Call, stuck: bool = False) -> None:
        results = [
            {"scores": [None] * call.num_completions, "cause": "timeout", "detail": ""}
            if place in call.late
            else result_of(_output_of(task), call.num_completions)
            for place, task in enumerate(call.tasks)
        ]
        if os.getpid() != self._pid:
            os._exit(0)  # a function forked, and this is the copy; only one may answer
        self._reset()
        del self._calls[call.number]
        answer = {"id": call.number, "results": results, "held_s": call.held_s, "stuck": stuck}
        self._outbox.put(json.dumps(answer).encode())
        self._write()

    def _write(self) -> None:
        if self._outbox.flush():
            self._loop.remove_writer(self._outbox.descriptor)
        else:
            self._loop.add_writer(self._outbox.descriptor, self._guarded, self._write)

    # The process -------------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        """What a call has set does not reach the next one."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(self._folder)

    def _broken(self, detail: str) -> None:
        """The loop has ended under the calls in flight; there is another, when it is clear whose fault that was."""
        if os.getpid() != self._pid:
            os._exit(0)
        if len(self._calls) > 1 or not self._outbox.flush():
            os._exit(1)
        for call in self._calls.values():
            self._reset()
            results = [result_of(Raised(detail), call.num_completions)] * len(call.functions)
            send(self._outbox.descriptor, json.dumps({"id": call.number, "results": results}).encode(), None)
        self._calls.clear()

    def _forked(self) -> None:
        """A copy of this process may do what it was made for, but must not go on in our loop.

        What is due at the same moment still has its turn in the copy.
        """
        self._loop.call_soon(os._exit, 0)

    def _tick(self) -> None:
        self._held_s = self._held_until_now_s()
        self._tick_due = time.monotonic() + _TICK_S
        self._loop.call_later(_TICK_S, self._tick)

    def _held_until_now_s(self) -> float:
        """In all, the step that just held it included."""
        late_s = time.monotonic() - self._tick_due
        return self._held_s + (late_s if late_s > _HELD_S else 0.0)


def _output_of(task: asyncio.Task[Any]) -> Any:
    return Raised("CancelledError") if task.cancelled() else task.result()


async def _output(function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    try:
        return await function(**arguments)
    except BaseException as error:  # noqa: BLE001 - SystemExit, CancelledError and whatever else user code raises
        return raised(error, file_of(function))
