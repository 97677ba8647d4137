"""A limit on concurrent actions of one kind. Retries never occupy all slots."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    """At most `total` actions run at once, and at most `again` of them are retries. The rest is for first attempts."""

    def __init__(self, total: int, again: int) -> None:
        self._all = asyncio.Semaphore(total)
        self._again = asyncio.Semaphore(again)

    @asynccontextmanager
    async def turn(self, *, again: bool) -> AsyncIterator[None]:
        """Wait for a slot and hold it."""
        if not again:
            async with self._all:
                yield
            return
        async with self._again, self._all:
            yield
