"""On GPUs that engines share with the policy, engines are built or the policy computes, and never both.

An engine measures at its start how much memory there is, and the policy's step takes and returns much of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from actors.pacer import AsyncPacer


class Turns:
    """Several engines may be built side by side, and several groups of ranks may compute side by side; whoever holds a
    turn has deadlines of his own."""

    def __init__(self) -> None:
        self.num_building = 0
        """So many engines are being built: whoever would compute waits for them."""
        self.num_built = 0
        self._computing: set[object] = set()
        """Whoever computes."""
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def building(self) -> AsyncIterator[None]:
        """Nobody computes while the context is open."""
        await self.until(lambda: not self._computing)
        self.num_building += 1
        try:
            yield
        finally:
            self.num_building -= 1
            self.num_built += 1
            self._tell()

    @contextlib.asynccontextmanager
    async def computing(self) -> AsyncIterator[Callable[[], None]]:
        """No engine is built while the context is open, or until what it yields is called: whoever computes has done
        so, though he has not left the context yet."""
        await self.until(lambda: not self.num_building)
        me = object()
        self._computing.add(me)

        def computed() -> None:
            if me in self._computing:
                self._computing.remove(me)
                self._tell()

        try:
            yield computed
        finally:
            computed()

    async def until(self, condition: Callable[[], bool]) -> None:
        """A change of turns makes the condition true; the caller sets the deadline, if any."""
        while not condition():
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@contextlib.asynccontextmanager
async def turns_followed(turns: Turns | None, pacer: "AsyncPacer") -> AsyncIterator[None]:
    """While the context is open no batch is given to the policy while an engine is built on its GPUs, so that whoever
    stops the run is heard; nothing where they share none."""
    if turns is None:
        yield
        return
    pacer.num_building = lambda: turns.num_building
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(_follow(turns, pacer), name="follow the turns")
        yield
        following.cancel()


async def _follow(turns: Turns, pacer: "AsyncPacer") -> NoReturn:
    while True:
        known = turns.num_built
        await pacer.look_again()
        await turns.until(partial(_differs, turns, known))


def _differs(turns: Turns, known: int) -> bool:
    return turns.num_built != known
