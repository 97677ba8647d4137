"""Decide when each resource is reconciled: woken by events and by timers. A bounded number is reconciled at once.

Several events in a short time cause one reconcile; a wake-up during a reconcile causes exactly one more. Each resource
has one writer. After an error, the queue retries with exponential back-off. Every resource is also reconciled from
time to time. So a lost event delays a reconcile by minutes, but the result stays correct.

A resource that waits costs an entry, not a task. What a user changed runs before timers and first reconciles after a
start. Every SHARE_LATER-th place goes to the latter, so that nothing waits for ever. One namespace holds at most EACH
of the CONCURRENCY places, and a free place goes to the namespace that holds the fewest. A reconcile holds no place
while it waits for a lock or for the store (graft/work/places.py). A reconcile that takes longer than DEADLINE is ended
and retried like after an error. So one tenant's resources and files neither stop the reconciles of other tenants nor
fail the operator's probe.
"""

import asyncio
import heapq
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

from graft import metrics
from graft.kube import KubeError
from graft.work.lanes import Group, Key, Lane
from graft.work.places import Place

__all__ = ["Key", "Queue"]

log = logging.getLogger(__name__)

Reconcile = Callable[[str, str], Awaitable[float | None]]

RESYNC = 600.0  # seconds until a resource is reconciled without an event
BACKOFF_FIRST = 1.0  # seconds
BACKOFF_LAST = 60.0  # seconds
CONFLICT_FIRST = 0.05  # seconds; the other writer has usually finished by then
CONCURRENCY = 16  # reconciles at the same time
EACH = 8  # reconciles of one namespace at the same time
AWAY = 32  # reconciles of one kind in one namespace that wait for a lock or the store; each holds some 20 kB
SHARE_LATER = 8  # of this many places, one goes to what can wait
DEADLINE = 180.0  # seconds for one reconcile; the probe fails later (STUCK_AFTER in graft/handlers.py)
CONFLICT = 409  # HTTP status of a write that is based on an outdated resourceVersion


class Queue:
    """The resources that one operator reconciles, and when."""

    def __init__(
        self,
        reconcilers: Mapping[str, Reconcile],
        resync: float = RESYNC,
        over: Callable[[Key], bool] = lambda key: False,
    ) -> None:
        """`over`: whether a resource needs no further reconcile. It is asked after each reconcile that did not fail."""
        self._reconcilers = reconcilers
        self._over = over
        self._resync = resync
        self._known: dict[Group, set[str]] = {}
        self._returning, self._now, self._later = Lane(), Lane(), Lane()
        self._since: dict[Key, float] = {}  # when each waiting resource began to wait (time.monotonic)
        # Woken while it is reconciled -> the time of the next reconcile, and whether it can wait.
        self._again: dict[Key, tuple[float, bool]] = {}
        self._failures: dict[Key, int] = {}  # in sequence
        self._not_before: dict[Key, float] = {}  # of failing resources: events must not cause a hot loop
        self._due: dict[Key, tuple[float, bool]] = {}  # time of the next reconcile, and whether it can wait
        self._timers: list[tuple[float, Key]] = []  # a heap; an entry that differs from _due is void
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = 0.0
        self._tasks: dict[Key, asyncio.Task[tuple[float, bool]]] = {}
        self._places: dict[Key, Place] = {}
        self._grants: dict[Key, asyncio.Future[None]] = {}  # of reconciles that wait for a place again
        self._held: Counter[str] = Counter()  # places by namespace
        self._away: Counter[Group] = Counter()  # reconciles that have begun and hold no place
        self._given = 0
        self.last_done = time.monotonic()
        self.busy: dict[Key, float] = {}  # start of each running reconcile (time.monotonic), for the probe

    def __contains__(self, key: Key) -> bool:
        return key[2] in self._known.get(key[:2], ())

    def keys(self, kind: str, namespace: str | None = None) -> list[Key]:
        """Return the keys of the resources of a kind that are reconciled."""
        groups = [(kind, namespace)] if namespace is not None else [group for group in self._known if group[0] == kind]
        return [(*group, name) for group in groups for name in self._known.get(group, ())]

    def waiting(self) -> list[float]:
        """Return for how many seconds each resource has waited for its reconcile. Any thread may call this."""
        now = time.monotonic()
        return [now - since for since in list(self._since.values())]

    def wake(self, kind: str, namespace: str, name: str, *, later: bool = False, after: float = 0.0) -> None:
        """Reconcile a resource soon. `later`: nobody waits for it, so what users have changed runs first. `after`: seconds
        in which further wake-ups cause no other reconcile."""
        key = (kind, namespace, name)
        if key not in self:
            self._known.setdefault(key[:2], set()).add(name)
            metrics.RESOURCES.labels(kind).inc()
        now = time.monotonic()
        earliest = max(self._not_before.get(key, 0.0), now + after)
        if key in self._tasks:
            due, waits = self._again.get(key, (earliest, later))
            self._again[key] = min(earliest, due), later and waits
        elif earliest > now:
            if key in self._now or key in self._later:
                return  # it is reconciled before that
            due, waits = self._due.get(key, (earliest, later))
            self._at(key, min(earliest, due), later and waits)
        else:
            self._ready(key, later)
        self._dispatch()

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """Stop reconciling a resource that no longer exists. A running reconcile is cancelled."""
        key = (kind, namespace, name)
        if key not in self:
            return
        self._known[key[:2]].discard(name)
        if not self._known[key[:2]]:
            del self._known[key[:2]]
        metrics.RESOURCES.labels(kind).dec()
        self._now.discard(key)
        self._later.discard(key)
        for state in (self._again, self._failures, self._not_before, self._due, self._since, self.busy):
            state.pop(key, None)
        if key in self._tasks:
            self._tasks[key].cancel()

    async def stop(self) -> None:
        """Stop all reconciles. Nothing is reconciled afterwards."""
        self._known.clear()
        self._now, self._later = Lane(), Lane()
        self._since.clear()
        self._again.clear()
        self._due.clear()
        if self._alarm is not None:
            self._alarm.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ready(self, key: Key, later: bool) -> None:
        """Let a resource wait for a place."""
        self._due.pop(key, None)
        self._since.setdefault(key, time.monotonic())
        if later and key not in self._now:
            self._later.add(key)
        else:
            self._later.discard(key)
            self._now.add(key)

    def _at(self, key: Key, when: float, later: bool) -> None:
        """Let a resource wait for a time (time.monotonic)."""
        self._due[key] = (when, later)
        heapq.heappush(self._timers, (when, key))
        if len(self._timers) > 2 * len(self._due) + 64:  # most entries are void
            self._timers = [(due, each) for each, (due, _) in self._due.items()]
            heapq.heapify(self._timers)
        self._set_alarm()

    def _set_alarm(self) -> None:
        if not self._timers or (self._alarm is not None and self._alarm_at <= self._timers[0][0]):
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = self._timers[0][0]
        wait = max(0.0, self._alarm_at - time.monotonic())
        self._alarm = asyncio.get_running_loop().call_later(wait, self._ring)

    def _ring(self) -> None:
        """Let the resources whose time has come wait for a place."""
        self._alarm = None
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            when, key = heapq.heappop(self._timers)
            due, later = self._due.get(key, (None, False))
            if due == when:
                self._ready(key, later)
        self._set_alarm()
        self._dispatch()

    def _dispatch(self) -> None:
        """Give the free places to what waits."""
        while self._held.total() < CONCURRENCY:
            key = self._next()
            if key is None:
                break
            self._held[key[1]] += 1
            if key in self._grants:
                self._away[key[:2]] -= 1
                self._places[key].held = True
                self._grants.pop(key).set_result(None)
            else:
                self._begin(key)

    def _next(self) -> Key | None:
        def load(group: Group) -> int | None:
            held = self._held[group[1]]
            return held if held < EACH else None

        def load_of_new(group: Group) -> int | None:
            return load(group) if self._away[group] < AWAY else None

        found = self._returning.take(load)  # it holds locks, and files in memory
        if found is None:
            self._given += 1
            lanes = (self._later, self._now) if self._given % SHARE_LATER == 0 else (self._now, self._later)
            found = lanes[0].take(load_of_new) or lanes[1].take(load_of_new)
        return found

    def _give_back(self, key: Key) -> None:
        self._held[key[1]] -= 1
        if not self._held[key[1]]:
            del self._held[key[1]]

    def _leave(self, key: Key) -> None:
        self._give_back(key)
        self._away[key[:2]] += 1
        self._dispatch()

    async def _come_back(self, key: Key) -> None:
        if key not in self._grants:
            self._grants[key] = asyncio.get_running_loop().create_future()
            self._returning.add(key)
            self._dispatch()
        if (grant := self._grants.get(key)) is not None:
            await asyncio.shield(grant)  # parallel parts of a reconcile may wait for it

    def _begin(self, key: Key) -> None:
        self._since.pop(key, None)
        place = self._places[key] = Place(lambda: self._leave(key), lambda: self._come_back(key))
        task = self._tasks[key] = asyncio.create_task(self._work(key, place), name="/".join(key))
        # Unlike a block `finally`, this runs even if the task is cancelled before it starts.
        task.add_done_callback(lambda task: self._ended(key, task))

    def _ended(self, key: Key, task: asyncio.Task[tuple[float, bool]]) -> None:
        """Free the place, and decide when the next reconcile is due."""
        place = self._places.pop(key)
        place.ended = True
        del self._tasks[key]
        if place.held:
            self._give_back(key)
        else:
            self._away[key[:2]] -= 1
            self._returning.discard(key)
            self._grants.pop(key, None)
        if not self._away[key[:2]]:
            del self._away[key[:2]]
        if key in self:  # a cancelled resource may have been created again meanwhile
            pause, failed = (0.0, False) if task.cancelled() else task.result()
            if not task.cancelled() and not failed and self._over(key):
                self.forget(*key)
            else:
                self._plan(key, pause, failed)
        self._dispatch()

    def _plan(self, key: Key, pause: float, failed: bool) -> None:
        now = time.monotonic()
        self._not_before.pop(key, None)
        if failed:
            self._not_before[key] = now + min(pause, BACKOFF_FIRST)
        again, later = self._again.pop(key, (None, False))
        if again is not None:
            again = max(again, self._not_before.get(key, 0.0))
            self._ready(key, later) if again <= now else self._at(key, again, later)
        elif pause <= 0:
            self._ready(key, later=False)  # the next step of the same change
        else:
            self._at(key, now + pause * random.uniform(0.8, 1.2), later=not failed)  # noqa: S311 - jitter

    async def _work(self, key: Key, place: Place) -> tuple[float, bool]:
        """Reconcile once. Return the seconds until the next reconcile, and whether the reconcile failed."""
        place.enter()
        kind, namespace, name = key
        self.busy[key] = started = time.monotonic()
        try:
            async with asyncio.timeout(DEADLINE):
                pause = await self._reconcilers[kind](namespace, name)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            fields = {"resource": "/".join(key), "error": str(error) or type(error).__name__}
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            if isinstance(error, KubeError) and error.status == CONFLICT:
                metrics.RECONCILES.labels(kind, "conflict").inc()
                log.info("another writer changed the resource during the reconcile, retrying", extra=fields)
                return min(BACKOFF_LAST, CONFLICT_FIRST * 2.0 ** min(failures - 1, 16)), True
            metrics.RECONCILES.labels(kind, "error").inc()
            log.exception("reconcile failed", extra=fields)
            return min(BACKOFF_LAST, BACKOFF_FIRST * 2.0 ** min(failures - 1, 16)), True
        finally:
            self.busy.pop(key, None)
            self.last_done = time.monotonic()
            metrics.RECONCILE_SECONDS.labels(kind).observe(time.monotonic() - started)
        self._failures.pop(key, None)
        metrics.RECONCILES.labels(kind, "done").inc()
        return self._resync if pause is None else pause, False
