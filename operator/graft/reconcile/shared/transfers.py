"""Run long work on stored files beside the reconciles: one reconcile starts it, and later reconciles check whether it
is done.

Copying gigabytes within a reconcile would hold a worker of the queue. Nothing is remembered across a restart of the
operator, so the work must be safe to repeat.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from graft.artifacts.archive import Interrupted
from graft.work.turns import Turns


class Share(NamedTuple):
    """How much work of one kind runs at the same time."""

    at_once: int  # over all namespaces
    each: int  # of one namespace


# Verification reads every byte. More verifications at once would only share the same bandwidth.
# Compression keeps a core busy. A user waits for a restoration, so it does not queue behind work of other kinds.
SHARES = {"publish": Share(4, 2), "verify": Share(4, 2), "restore": Share(2, 1), "delete": Share(4, 2)}
OTHERS = Share(1, 1)
# The threads of asyncio are for short calls and for name resolution. Transfers never occupy them.
THREADS = 16


class Transfer:
    """One piece of work in a thread. `call` gets its arguments and a function that returns whether it must stop."""

    def __init__(
        self, what: str, namespace: str, turns: Turns, threads: ThreadPoolExecutor, then: Callable[[], None]
    ) -> None:
        self.what = what
        self._namespace, self._turns, self._threads, self._then = namespace, turns, threads, then
        self._stop = threading.Event()
        self._started = False
        self._task: asyncio.Task[Any]

    def begin(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Run the call when it is this namespace's turn."""
        self._task = asyncio.create_task(self._run(call, *arguments), name=self.what)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # marks the exception as read, so asyncio does not log it; result() raises it
        self._then()

    async def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        async with self._turns.turn(self._namespace):
            self._started = True
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: call(*arguments, self._stop.is_set))

    def stop(self) -> bool:
        """Ask the work to stop soon. Return True if it has not begun: then it never begins."""
        self._stop.set()
        return not self._started and self._task.cancel()

    @property
    def done(self) -> bool:
        return self._task.done()

    @property
    def interrupted(self) -> bool:
        """Whether the work ended because it was asked to stop. Then it has to be started again."""
        return self.done and not self._task.cancelled() and isinstance(self._task.exception(), Interrupted)

    def result(self) -> Any:
        """Return what the call returned, or raise its exception."""
        return self._task.result()


class Transfers:
    """The running work, by the UID of its resource. A resource has at most one piece of work."""

    def __init__(self) -> None:
        self._running: dict[str, Transfer] = {}
        self._turns: dict[str, Turns] = {}
        self._threads = ThreadPoolExecutor(THREADS, "transfer")

    def start(
        self,
        uid: str,
        what: str,
        call: Callable[..., Any],
        *arguments: Any,
        namespace: str = "",
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Start work for a resource. Earlier work of the resource must be done; its result is dropped.

        The work waits for a turn of its `namespace`. `then` is called on the event loop when the work has ended.
        """
        assert uid not in self._running or self._running[uid].done  # noqa: S101
        turns = self._turns.setdefault(what, Turns(*SHARES.get(what, OTHERS)))
        transfer = self._running[uid] = Transfer(what, namespace, turns, self._threads, then)
        transfer.begin(call, *arguments)

    def find(self, uid: str) -> Transfer | None:
        return self._running.get(uid)

    def has(self, uid: str, what: str) -> bool:
        """Return whether work of this kind waits, runs, or has a result that no reconcile has read."""
        found = self._running.get(uid)
        return found is not None and found.what == what

    def forget(self, uid: str) -> bool:
        """Ask the work of a resource to stop. Return whether no work runs any more."""
        transfer = self._running.get(uid)
        if transfer is not None and not transfer.done and not transfer.stop():
            return False
        self._running.pop(uid, None)
        return True

    def stop(self) -> None:
        """Ask all work to stop. The process ends, so its threads must end too."""
        for transfer in self._running.values():
            transfer.stop()
