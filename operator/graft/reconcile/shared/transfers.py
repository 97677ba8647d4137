"""Run long work on stored files beside the reconciles: one reconcile starts it, and later reconciles check whether it
is done.

Copying gigabytes within a reconcile would make the operator's probe fail. Nothing is remembered across a restart of the
operator, so the work must be safe to repeat.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Transfer:
    """One piece of work in a thread. `call` gets its arguments and a function that returns whether it must stop."""

    def __init__(self, what: str, turn: asyncio.Semaphore, call: Callable[..., Any], *arguments: Any) -> None:
        self.what = what
        self._turn = turn
        self._stop = threading.Event()
        self._task = asyncio.create_task(self._run(call, *arguments), name=what)

    async def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        async with self._turn:
            return await asyncio.to_thread(call, *arguments, self._stop.is_set)

    def stop(self) -> None:
        """Ask the work to stop soon. It has stopped when `done` is True."""
        self._stop.set()

    @property
    def done(self) -> bool:
        return self._task.done()

    def result(self) -> Any:
        """Return what the call returned, or raise its exception."""
        return self._task.result()


class Transfers:
    """The running work, by the UID of its resource. A resource has at most one piece of work."""

    def __init__(self) -> None:
        self._running: dict[str, Transfer] = {}
        # Only one of each kind of work runs at a time, because compression keeps a core busy. A user waits for a
        # restoration, so it does not queue behind work of other kinds.
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(1))

    def start(self, uid: str, what: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Start work for a resource. Earlier work of the resource must be done; its result is dropped."""
        assert uid not in self._running or self._running[uid].done  # noqa: S101
        self._running[uid] = Transfer(what, self._turns[what], call, *arguments)

    def find(self, uid: str) -> Transfer | None:
        return self._running.get(uid)

    def forget(self, uid: str) -> bool:
        """Ask the work of a resource to stop. Return whether no work runs any more."""
        transfer = self._running.get(uid)
        if transfer is not None and not transfer.done:
            transfer.stop()
            return False
        self._running.pop(uid, None)
        return True

    def stop(self) -> None:
        """Ask all work to stop. The process ends, so its threads must end too."""
        for transfer in self._running.values():
            transfer.stop()
