"""Long work on stored files, beside the looks: a look starts it, and later looks see whether it is done.

A look that took as long as gigabytes take would count as hanging. Nothing is remembered across a restart: the work can be repeated.
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Transfer:
    """One piece of work in a thread. `call` gets its arguments and a function that says whether to stop."""

    def __init__(self, what: str, turn: asyncio.Semaphore, call: Callable[..., Any], *arguments: Any) -> None:
        self.what = what
        self._turn = turn
        self._stop = threading.Event()
        self._task = asyncio.create_task(self._run(call, *arguments), name=what)

    async def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        async with self._turn:
            return await asyncio.to_thread(call, *arguments, self._stop.is_set)

    def stop(self) -> None:
        """Ask it to end soon; it is done when `done` says so."""
        self._stop.set()

    @property
    def done(self) -> bool:
        return self._task.done()

    def result(self) -> Any:
        """What the call returned, or its exception."""
        return self._task.result()


class Transfers:
    """The work that goes on, by the UID of the resource that it is for: never two for one."""

    def __init__(self) -> None:
        self._running: dict[str, Transfer] = {}
        # One of a kind at a time: the coder keeps a core busy. A restoration, which somebody waits for, does not queue behind others.
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(1))

    def start(self, uid: str, what: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Start it; whatever there was for the resource is done and no longer of interest."""
        assert uid not in self._running or self._running[uid].done  # noqa: S101
        self._running[uid] = Transfer(what, self._turns[what], call, *arguments)

    def find(self, uid: str) -> Transfer | None:
        return self._running.get(uid)

    def forget(self, uid: str) -> bool:
        """Stop what goes on for a resource; whether nothing does any more."""
        transfer = self._running.get(uid)
        if transfer is not None and not transfer.done:
            transfer.stop()
            return False
        self._running.pop(uid, None)
        return True

    def stop(self) -> None:
        """The process ends: the threads must, too."""
        for transfer in self._running.values():
            transfer.stop()
