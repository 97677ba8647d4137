"""Make short calls of the store in threads of their own, with a share for each namespace, and fail fast while the
store does not answer.

Long work is a transfer (reconcile/shared/transfers.py).
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from graft.artifacts.storage import StoreError
from graft.work.places import away
from graft.work.turns import Turns

T = TypeVar("T")

THREADS = 32  # calls at the same time
EACH = 8  # calls of one namespace at the same time
SILENCE = 5.0  # seconds for which calls of a namespace fail at once after one got no answer


class StoreCalls:
    """The short calls of one operator.

    After a call without an answer, further calls of the same namespace raise StoreError at once. Every SILENCE seconds,
    one of them is sent, to find out whether the store answers again. Namespaces do not share this: a tenant's listing
    that takes too long must not end the calls of other tenants.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, "store")
        self._turns = Turns(THREADS, EACH)
        self._silent: dict[str, tuple[float, str]] = {}  # namespace -> when the next call is sent, and the last error

    async def run(self, namespace: str, call: Callable[..., T], *arguments: Any) -> T:
        """Return what the call returns. The reconcile holds no place meanwhile. Raises StoreError.

        `namespace` is "" for the operator's own calls.
        """
        self._check(namespace)
        task = asyncio.create_task(self._in_turn(namespace, call, *arguments))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may wait for it any more
        async with away():
            # A thread cannot be cancelled. Its turn is taken until it ends.
            return await asyncio.shield(task)

    async def _in_turn(self, namespace: str, call: Callable[..., T], *arguments: Any) -> T:
        async with self._turns.turn(namespace):
            self._check(namespace)
            if namespace in self._silent:
                self._wait(namespace, self._silent[namespace][1])  # this call asks for all of them
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*arguments))
            except Exception as error:
                if isinstance(error, StoreError) and not error.answered:
                    self._wait(namespace, str(error))
                else:
                    self._silent.pop(namespace, None)
                raise
            self._silent.pop(namespace, None)
            return found

    def _wait(self, namespace: str, why: str) -> None:
        self._silent[namespace] = (self._clock() + SILENCE, why)

    def _check(self, namespace: str) -> None:
        until, why = self._silent.get(namespace, (0.0, ""))
        if self._clock() < until:
            raise StoreError("unavailable", f"the store did not answer the last call: {why}", answered=False)
