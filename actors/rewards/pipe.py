"""A message crosses the pipe whole and before its deadline, or not at all: its length, then its bytes.

Reward functions run in a child process that may print, hang or die at any byte; both sides use what is here on pipes of
their own, so nothing that is printed can mix with the messages. `send` and `receive` wait; an Outbox and an Inbox never
do, for who has many messages under way.
"""

import os
import select
import struct
import time
from collections.abc import Sequence

_LENGTH = struct.Struct(">Q")
_LONGEST = 1 << 32
"""No message is longer (bytes); a length beyond it was not written by us."""
_PIECE = 1 << 20
"""Bytes that are read or written at once."""


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


class Outbox:
    """What is to be written to a non-blocking pipe, in order."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = bytearray()

    def put(self, message: bytes) -> None:
        self._rest += _LENGTH.pack(len(message)) + message

    def flush(self) -> bool:
        """Write as much as goes at once; whether that was all. EOFError when nobody reads any more."""
        while self._rest:
            try:
                # A slice, because a bytearray cannot be cut while somebody looks at it.
                del self._rest[: os.write(self.descriptor, self._rest[:_PIECE])]
            except BlockingIOError:
                return False
            except BrokenPipeError as error:
                raise EOFError("the other side has closed the pipe") from error
        return True


class Inbox:
    """What comes out of a non-blocking pipe, message by message."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._rest = bytearray()

    def read(self) -> list[bytes]:
        """The messages that are whole by now; EOFError when none can come any more."""
        try:
            part = os.read(self.descriptor, _PIECE)
        except BlockingIOError:
            return []
        if not part:
            raise EOFError("the other side has closed the pipe")
        self._rest += part
        messages: list[bytes] = []
        while len(self._rest) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._rest)
            if length > _LONGEST:
                raise EOFError("the pipe holds what is not a message")
            end = _LENGTH.size + length
            if len(self._rest) < end:
                break
            messages.append(bytes(self._rest[_LENGTH.size : end]))
            del self._rest[:end]
        return messages


def wait_for_any(reads: Sequence[int], writes: Sequence[int], timeout_s: float) -> set[int]:
    """The descriptors that can be used now, or whose other side has closed them; none when the time is over."""
    poller = select.poll()
    for descriptor in reads:
        poller.register(descriptor, select.POLLIN)
    for descriptor in writes:
        poller.register(descriptor, select.POLLOUT)
    return {descriptor for descriptor, _ in poller.poll(max(0.0, timeout_s) * 1000)}


def _read(descriptor: int, num_bytes: int, deadline: float | None) -> bytes:
    parts: list[bytes] = []
    while num_bytes > 0:
        _wait(descriptor, select.POLLIN, deadline)
        try:
            part = os.read(descriptor, min(num_bytes, _PIECE))
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
