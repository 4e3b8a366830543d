"""The process in which reward functions run: it may hang, print or die at any moment, and its parent notices.

`python -m actors.rewards.child REQUEST_FD RESPONSE_FD PARENT_PID COLUMNS FUNCTION...` loads the functions, says whether
each is async, and then answers requests until the pipe closes. See process.py for the other side.
"""

import asyncio
import copy
import ctypes
import inspect
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from actors.rewards.functions import RewardError, checked_scores, describe, load
from actors.rewards.pipe import receive, send

_PR_SET_PDEATHSIG = 1

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class Raised:
    """A call that raised, in place of its output."""

    detail: str


def main(request_fd: int, response_fd: int, parent: int, columns: list[str] | None, names: list[str]) -> None:
    """Serve requests until the parent closes the pipe; when a function cannot be loaded, say so and end."""
    _die_with(parent)
    for descriptor in (request_fd, response_fd):
        # Programs that reward functions start must not keep the pipe open.
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
    try:
        functions = [load(name, columns) for name in names]
    except RewardError as error:
        send(response_fd, json.dumps({"error": str(error)}).encode(), None)
        return
    send(response_fd, json.dumps({"is_async": [_is_async(function) for function in functions]}).encode(), None)
    _serve(request_fd, response_fd, functions)


def _serve(request_fd: int, response_fd: int, functions: list[RewardFunction]) -> None:
    """One answer to each request, in order; timers, folder and forks of a call do not reach the next one."""
    own_pid, folder = os.getpid(), os.getcwd()
    loop = _new_loop()
    while True:
        try:
            message = receive(request_fd, None)
        except EOFError:
            return
        request = json.loads(message)
        called = [functions[index] for index in request["functions"]]
        # Every function has arguments of its own, so none sees what another has changed.
        outputs = [_called(function, keywords(json.loads(message)["arguments"])) for function in called]
        if any(inspect.isawaitable(output) for output in outputs):
            loop = _new_loop() if loop.is_closed() else loop
            try:
                outputs = loop.run_until_complete(_gathered(outputs))
            except BaseException as error:  # noqa: BLE001 - raised by a task that a function left behind
                outputs = [Raised(describe(error))] * len(called)
                loop = _new_loop()
        results = [_result(output, len(request["arguments"]["completions"])) for output in outputs]
        if os.getpid() != own_pid:
            os._exit(0)  # a function forked and both processes returned; only one may answer
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(response_fd, json.dumps({"id": request["id"], "results": results}).encode(), None)
        os.chdir(folder)


def keywords(arguments: dict[str, Any]) -> dict[str, list[Any]]:
    """The keywords of a call (TRL's contract): one item per completion, the prompt and the columns repeated."""
    num_completions = len(arguments["completions"])
    repeated = {"prompts": arguments["prompt"], **arguments["columns"]}
    return {
        **{name: [copy.deepcopy(value) for _ in range(num_completions)] for name, value in repeated.items()},
        "completions": arguments["completions"],
        "completion_ids": arguments["completion_ids"],
    }


def _called(function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    try:
        return function(**arguments)
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of user code are failures, too
        return Raised(describe(error, _file_of(function)))


async def _gathered(outputs: list[Any]) -> list[Any]:
    """All outputs; those of async functions are awaited together (as TRL does)."""

    async def awaited(output: Awaitable[Any]) -> Any:
        try:
            return await output
        except BaseException as error:  # noqa: BLE001 - as above, and CancelledError
            return Raised(describe(error))

    async def given(output: Any) -> Any:
        return output

    return await asyncio.gather(*(awaited(o) if inspect.isawaitable(o) else given(o) for o in outputs))


def _result(output: Any, num_completions: int) -> dict[str, Any]:
    """`scores` (one float or None per completion), `cause` (None, `exception` or `bad_output`) and `detail`."""
    nothing = [None] * num_completions
    if isinstance(output, Raised):
        return {"scores": nothing, "cause": "exception", "detail": output.detail}
    try:
        scores, problem = checked_scores(output, num_completions)
    except BaseException as error:  # noqa: BLE001 - looking at the output runs user code as well
        return {"scores": nothing, "cause": "bad_output", "detail": describe(error)}
    return {"scores": scores, "cause": "bad_output" if problem else None, "detail": problem}


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _file_of(function: RewardFunction) -> str | None:
    return function.__code__.co_filename if inspect.isfunction(function) else None


def _new_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, so that a client a function keeps open stays usable."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, even in the middle of a call that never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died before we asked


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5:])
    # Threads that reward functions have started must not keep the process.
    os._exit(0)
