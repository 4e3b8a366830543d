"""A message crosses the pipe whole and before its deadline, or not at all: its length, then its bytes.

Reward functions run in a child process that may print, hang or die at any byte; both sides use these two functions on
pipes of their own, so nothing that is printed can mix with the messages.
"""

import os
import select
import struct
import time

_LENGTH = struct.Struct(">Q")
_LONGEST = 1 << 32
"""No message is longer (bytes); a length beyond it was not written by us."""


def send(descriptor: int, message: bytes, deadline: float | None) -> None:
    """Write a whole message to a non-blocking pipe; TimeoutError past `deadline` (time.monotonic), EOFError when
    nobody reads any more. With None it waits for ever."""
    rest = memoryview(_LENGTH.pack(len(message)) + message)
    while rest:
        _wait(descriptor, select.POLLOUT, deadline)
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            continue
        except BrokenPipeError as error:
            raise EOFError("the other side has closed the pipe") from error


def receive(descriptor: int, deadline: float | None) -> bytes:
    """Read a whole message from a non-blocking pipe; TimeoutError past `deadline`, EOFError when it cannot come."""
    (length,) = _LENGTH.unpack(_read(descriptor, _LENGTH.size, deadline))
    if length > _LONGEST:
        raise EOFError("the pipe holds what is not a message")
    return _read(descriptor, length, deadline)


def _read(descriptor: int, num_bytes: int, deadline: float | None) -> bytes:
    parts: list[bytes] = []
    while num_bytes > 0:
        _wait(descriptor, select.POLLIN, deadline)
        try:
            part = os.read(descriptor, min(num_bytes, 1 << 20))
        except BlockingIOError:
            continue
        if not part:
            raise EOFError("the other side has closed the pipe")
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _wait(descriptor: int, event: int, deadline: float | None) -> None:
    """Return when the pipe can be used (or was closed); poll, because select() takes no descriptor above 1023."""
    poller = select.poll()
    poller.register(descriptor, event)
    if deadline is None:
        poller.poll()
    elif not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
