"""The place that a running reconcile holds, and giving it back while the reconcile waits.

A reconcile that waits for a lock or for the store must not hold a place: then one tenant's lock, or a store that hangs,
would stop the reconciles of all tenants.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar

_current: ContextVar["Place | None"] = ContextVar("place", default=None)


class Place:
    """The place of one reconcile. `leave` gives it back; `come_back` waits until there is a place again."""

    def __init__(self, leave: Callable[[], None], come_back: Callable[[], Awaitable[None]]) -> None:
        self._leave, self._come_back = leave, come_back
        self._absences = 0  # parallel parts of the reconcile that wait
        self.held = True  # set again by the giver of places
        self.ended = False

    def enter(self) -> None:
        """Make this the place of the current task, and of the tasks that it creates."""
        _current.set(self)

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Hold no place inside the block."""
        self._absences += 1
        if self.held and not self.ended:
            self.held = False
            self._leave()
        try:
            yield
        except asyncio.CancelledError:
            self._absences -= 1  # the reconcile ends, and needs no place for that
            raise
        except BaseException:
            await self._return()
            raise
        else:
            await self._return()

    async def _return(self) -> None:
        self._absences -= 1
        # The last part that returns waits for a place. A task that outlives its reconcile gets none.
        if not self._absences and not self.held and not self.ended:
            await self._come_back()


@contextlib.asynccontextmanager
async def away() -> AsyncIterator[None]:
    """Give back the place of the running reconcile while the block waits. Outside a reconcile, nothing is given back."""
    place = _current.get()
    async with contextlib.nullcontext() if place is None else place.away():
        yield


class Locks:
    """Locks by name. A reconcile that waits for one gives its place back."""

    def __init__(self) -> None:
        self._locks: dict[tuple[str, ...], asyncio.Lock] = {}
        self._users: dict[tuple[str, ...], int] = {}  # that hold the lock or wait for it

    @contextlib.asynccontextmanager
    async def hold(self, *name: str) -> AsyncIterator[None]:
        """Hold the lock of this name. Only one task at a time does."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        free = name not in self._users
        self._users[name] = self._users.get(name, 0) + 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with contextlib.nullcontext() if free else away():
                    await stack.enter_async_context(lock)
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]
