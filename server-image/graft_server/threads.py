"""Work of a request that runs in a thread, beside the event loop."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(turn: asyncio.Lock, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `call` returns. Calls with the same lock run one at a time.

    Python cannot stop a thread. If the request is cancelled, this waits until the thread ends. Until then the lock is
    held, and the caller still counts the bytes that the thread uses. A call that waits for the lock never starts.
    """
    async with turn:
        work = asyncio.get_running_loop().run_in_executor(None, partial(call, *args, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise
