"""Give turns to work of many namespaces: a bounded number over all, and a share for each namespace.

One namespace with hundreds of resources must not make other namespaces wait. This module does not know what the work
is.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator


class Turns:
    """Turns for work of one kind.

    A free turn goes to the waiting namespace with the fewest turns. Among those it goes to the namespace that was
    served longest ago.
    """

    def __init__(self, at_once: int, each: int) -> None:
        """Allow `at_once` turns at the same time, and `each` of them to one namespace."""
        self._at_once, self._each = at_once, each
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._served: dict[str, int] = {}  # namespace -> number of its last turn, until nothing waits or runs
        self._count = 0

    @contextlib.asynccontextmanager
    async def turn(self, namespace: str) -> AsyncIterator[None]:
        """Wait for a turn of the namespace, and hold it."""
        await self._take(namespace)
        try:
            yield
        finally:
            self._give_back(namespace)

    async def _take(self, namespace: str) -> None:
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(namespace, deque()).append(granted)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():  # it was granted in the same moment
                self._give_back(namespace)
            raise  # _grant drops what was cancelled while it waited

    def _give_back(self, namespace: str) -> None:
        self._held[namespace] -= 1
        if not self._held[namespace]:
            del self._held[namespace]
        self._grant()

    def _grant(self) -> None:
        while self._held.total() < self._at_once:
            able = [namespace for namespace in self._waiting if self._held[namespace] < self._each]
            if not able:
                break
            namespace = min(able, key=lambda name: (self._held[name], self._served.get(name, 0)))
            granted = self._waiting[namespace].popleft()
            if not self._waiting[namespace]:
                del self._waiting[namespace]
            if granted.cancelled():
                continue
            self._held[namespace] += 1
            self._count += 1
            self._served[namespace] = self._count
            granted.set_result(None)
        if not self._waiting and not self._held:
            self._served.clear()
