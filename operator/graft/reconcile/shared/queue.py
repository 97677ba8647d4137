"""Decide when each resource is reconciled: one worker per resource, woken by events and by a timer.

Several events in a short time cause one reconcile; a wake-up during a reconcile causes exactly one more. Each resource
has one writer. After an error, the worker retries with exponential back-off. Every resource is also reconciled from
time to time. So a lost event delays a reconcile by minutes, but the result stays correct.

One namespace holds at most EACH of the CONCURRENCY places, and a free place goes to the namespace that holds the fewest.
A reconcile that takes longer than DEADLINE is ended and retried like after an error. So one tenant's resources and
files neither stop the reconciles of other tenants nor fail the operator's probe.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from graft import metrics
from graft.kube import KubeError
from graft.reconcile.shared.turns import Turns

log = logging.getLogger(__name__)

Key = tuple[str, str, str]  # kind, namespace, name
Reconcile = Callable[[str, str], Awaitable[float | None]]

RESYNC = 600.0  # seconds until a resource is reconciled without an event
BACKOFF_FIRST = 1.0  # seconds
BACKOFF_LAST = 60.0  # seconds
CONCURRENCY = 16  # reconciles at the same time
EACH = 8  # reconciles of one namespace at the same time
DEADLINE = 180.0  # seconds for one reconcile; the probe fails later (STUCK_AFTER in graft/handlers.py)
CONFLICT = 409  # HTTP status of a write that is based on an outdated resourceVersion


class Queue:
    """The workers of all resources of one operator."""

    def __init__(self, reconcilers: dict[str, Reconcile], resync: float = RESYNC) -> None:
        self._reconcilers = reconcilers
        self._resync = resync
        self._wakes: dict[Key, asyncio.Event] = {}
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._slots = Turns(CONCURRENCY, EACH)
        self.last_done = time.monotonic()
        self.busy: dict[Key, float] = {}  # start of each running reconcile (time.monotonic), for the probe

    def wake(self, kind: str, namespace: str, name: str) -> None:
        """Reconcile a resource soon."""
        key = (kind, namespace, name)
        if key not in self._wakes:
            self._wakes[key] = asyncio.Event()
            self._tasks[key] = asyncio.create_task(self._work(key), name="/".join(key))
            metrics.RESOURCES.labels(kind).inc()
        self._wakes[key].set()

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """Stop the worker of a resource that no longer exists."""
        key = (kind, namespace, name)
        if self._wakes.pop(key, None) is not None:
            self._tasks.pop(key).cancel()
            self.busy.pop(key, None)
            metrics.RESOURCES.labels(kind).dec()

    def keys(self, kind: str, namespace: str | None = None) -> list[Key]:
        """Return the keys of the resources of a kind that have a worker."""
        return [key for key in self._wakes if key[0] == kind and namespace in {None, key[1]}]

    async def stop(self) -> None:
        """Stop all workers."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, key: Key) -> None:
        wake, failures = self._wakes[key], 0
        while True:
            wake.clear()
            pause = await self._once(key)
            if pause is None:
                failures += 1
                pause = min(BACKOFF_LAST, BACKOFF_FIRST * 2 ** (failures - 1))
            else:
                failures = 0
            pause *= random.uniform(0.8, 1.2)  # noqa: S311 - jitter
            try:
                await asyncio.wait_for(wake.wait(), pause)
            except TimeoutError:
                continue
            if failures:
                await asyncio.sleep(
                    min(pause, BACKOFF_FIRST)
                )  # events must not turn a failing reconcile into a hot loop

    async def _once(self, key: Key) -> float | None:
        """Reconcile once. Return the seconds until the next reconcile, or None after an error."""
        kind, namespace, name = key
        async with self._slots.turn(namespace):
            self.busy[key] = started = time.monotonic()
            try:
                async with asyncio.timeout(DEADLINE):
                    pause = await self._reconcilers[kind](namespace, name)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                fields = {"resource": "/".join(key), "error": str(error) or type(error).__name__}
                if isinstance(error, KubeError) and error.status == CONFLICT:
                    metrics.RECONCILES.labels(kind, "conflict").inc()
                    log.info("another writer changed the resource during the reconcile, retrying", extra=fields)
                else:
                    metrics.RECONCILES.labels(kind, "error").inc()
                    log.exception("reconcile failed", extra=fields)
                return None
            finally:
                self.busy.pop(key, None)
                self.last_done = time.monotonic()
                metrics.RECONCILE_SECONDS.labels(kind).observe(time.monotonic() - started)
            metrics.RECONCILES.labels(kind, "done").inc()
            return self._resync if pause is None else pause
