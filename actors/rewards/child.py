"""The process in which reward functions run: it may hang, print or die at any moment, and its parent notices.

`python -m actors.rewards.child REQUEST_FD RESPONSE_FD PARENT_PID MEMORY COLUMNS FUNCTION...` loads the functions, says
whether each is async, and then answers requests until the pipe closes: one after another, or, when all of its functions
are async, as many at a time as it is asked (together.py). See process.py for the other side.
"""

import asyncio
import ctypes
import inspect
import json
import os
import resource
import signal
import sys
from collections.abc import Awaitable
from typing import Any

from actors.rewards.call import RewardFunction, file_of, is_async, keywords, raised, result_of
from actors.rewards.functions import RewardError, load
from actors.rewards.pipe import receive, send
from actors.rewards.together import Together

_PR_SET_PDEATHSIG = 1


def main(
    request_fd: int, response_fd: int, parent: int, memory: int | None, columns: list[str] | None, names: list[str]
) -> None:
    """Serve requests until the parent closes the pipe; when a function cannot be loaded, say so and end."""
    _die_with(parent)
    if memory is not None:
        _limit_memory(memory)
    for descriptor in (request_fd, response_fd):
        # Programs that reward functions start must not keep the pipe open.
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
    try:
        functions = [load(name, columns) for name in names]
    except RewardError as error:
        fix = ""
        if memory is not None and isinstance(error.__cause__, MemoryError):
            fix = f"; raise rewards.max_memory_gb, which is {memory / 10**9:g}"
        send(response_fd, json.dumps({"error": f"{error}{fix}"}).encode(), None)
        return
    kinds = [is_async(function) for function in functions]
    send(response_fd, json.dumps({"is_async": kinds}).encode(), None)
    if all(kinds):
        Together(request_fd, response_fd, functions).serve()
    else:
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
                outputs = [raised(error)] * len(called)
                loop = _new_loop()
        results = [result_of(output, len(request["arguments"]["completions"])) for output in outputs]
        if os.getpid() != own_pid:
            os._exit(0)  # a function forked and both processes returned; only one may answer
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(response_fd, json.dumps({"id": request["id"], "results": results}).encode(), None)
        os.chdir(folder)


def _called(function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    try:
        return function(**arguments)
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of user code are failures, too
        return raised(error, file_of(function))


async def _gathered(outputs: list[Any]) -> list[Any]:
    """All outputs; those that a function left to be awaited are awaited together."""

    async def awaited(output: Awaitable[Any]) -> Any:
        try:
            return await output
        except BaseException as error:  # noqa: BLE001 - as above, and CancelledError
            return raised(error)

    async def given(output: Any) -> Any:
        return output

    return await asyncio.gather(*(awaited(o) if inspect.isawaitable(o) else given(o) for o in outputs))


def _new_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, so that a client a function keeps open stays usable."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop


def _limit_memory(num_bytes: int) -> None:
    """Beyond so many bytes of its own, this process gets no more memory: Python raises MemoryError.

    What is counted is mapped privately to be written, from then on and touched or not: heap, arrays, the stacks of
    threads. Address space that is reserved without access (PROT_NONE) is not; RLIMIT_AS would count it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, even in the middle of a call that never returns."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died before we asked


if __name__ == "__main__":
    _request, _response, _parent, _memory, _columns, *_names = sys.argv[1:]
    main(int(_request), int(_response), int(_parent), json.loads(_memory), json.loads(_columns), _names)
    # Threads that reward functions have started must not keep the process.
    os._exit(0)
