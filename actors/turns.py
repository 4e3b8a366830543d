"""On GPUs that engines share with the policy, engines are built or the policy computes, and never both.

An engine measures at its start how much memory there is, and the policy's step takes and returns much of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


class Turns:
    """Several engines may be built side by side; whoever holds a turn has deadlines of his own."""

    def __init__(self) -> None:
        self._num_building = 0
        self._computing: object | None = None
        """Whoever computes."""
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def building(self) -> AsyncIterator[None]:
        """The policy does not compute while the context is open."""
        await self._until(lambda: self._computing is None)
        self._num_building += 1
        try:
            yield
        finally:
            self._num_building -= 1
            self._tell()

    @contextlib.asynccontextmanager
    async def computing(self) -> AsyncIterator[None]:
        """No engine is built while the context is open, or until `computed`."""
        await self._until(lambda: self._computing is None and not self._num_building)
        me = self._computing = object()
        try:
            yield
        finally:
            if self._computing is me:
                self.computed()

    def computed(self) -> None:
        """Whoever computes has done so, though he has not left the context yet."""
        self._computing = None
        self._tell()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
