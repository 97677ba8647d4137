"""How many actions of a kind run at once, so that those which failed before never keep the others waiting."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """`total` at once, of which at most `again` are repetitions: the rest stays free for what was never tried."""

    def __init__(self, total: int, again: int) -> None:
        self._all = asyncio.Semaphore(total)
        self._again = asyncio.Semaphore(again)

    @asynccontextmanager
    async def turn(self, *, again: bool) -> AsyncIterator[None]:
        """Waits for a slot and holds it."""
        if not again:
            async with self._all:
                yield
            return
        async with self._again, self._all:
            yield
