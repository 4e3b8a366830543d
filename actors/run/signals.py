"""SIGTERM and the first Ctrl-C end a run in order; the second Ctrl-C ends it at once, or when a checkpoint
that is being written is there, in a minute at most."""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator

_SIGNALS = signal.SIGTERM, signal.SIGINT


@contextlib.contextmanager
def on_signal(stop: Callable[[], Awaitable[None]], say: Callable[[str], None]) -> Iterator[None]:
    """`stop` is called once when a signal asks the process to end; before and after, signals do what they did."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    stopping: list[asyncio.Task[None]] = []  # the loop itself holds tasks only weakly

    def restore() -> None:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def asked(number: signal.Signals) -> None:
        say(f"{number.name}: the run stops after the step under way and leaves a checkpoint, unless that was the last")
        restore()

        async def run() -> None:
            await stop()

        stopping.append(asyncio.create_task(run(), name="stop"))

    for number in _SIGNALS:
        loop.add_signal_handler(number, asked, number)
    try:
        yield
    finally:
        restore()
