"""Requests for deployments that may sleep: they wait here until a pod is ready, and the operator is informed of them.

The gateway starts no pods itself. It writes the time of a deployment's newest request into its own keys of the
ConfigMap graft-demand. While requests wait, it writes at once, but at most every URGENT_SECONDS. Otherwise it writes at
most once per `demand_interval`. The operator scales by these times.
"""

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from graft.contracts.gateway import DEMAND_CONFIGMAP, Demand, demand_interval, demand_key
from graft.status import now

from graft_server.configmaps import ConfigMaps, KubeError
from graft_server.gateway.errors import unavailable
from graft_server.gateway.metrics import Metrics
from graft_server.gateway.settings import Settings
from graft_server.gateway.table import Model

log = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, str]  # namespace, deployment
TICK_SECONDS = 1.0
URGENT_SECONDS = 2.0  # minimum time between two writes for a deployment with waiting requests
RETRY_SECONDS = 3.0  # pause after a failed write
RETRY_AFTER = 10  # seconds; the Retry-After header of the answer


class Activity:
    """The newest request for one deployment, and the writes about it. Times are from time.monotonic()."""

    def __init__(self, idle_seconds: int) -> None:
        self.idle_seconds = idle_seconds
        self.newest = 0.0
        self.told = 0.0  # the newest request that was written
        self.written: float | None = None  # time of the last write, also of a failed one

    def due(self, moment: float, *, waiting: bool) -> bool:
        """Return whether to write now: there is a newer request, and the last write is long enough ago."""
        if self.newest <= self.told:
            return False
        pause = URGENT_SECONDS if waiting else demand_interval(self.idle_seconds)
        return self.written is None or moment - self.written >= pause


class Waiting:
    """The held requests, and the activity of all deployments that may sleep."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._held: Counter[str] = Counter()  # by model
        self._waiting: Counter[Key] = Counter()  # by deployment
        self._running: Counter[Key] = Counter()
        self.activity: dict[Key, Activity] = {}
        self._changed = asyncio.Event()
        self.news = asyncio.Event()  # set when a request begins to wait: write now
        self._closed = False

    def table_changed(self) -> None:
        """Wake the held requests, so that they read the new table."""
        self._changed.set()
        self._changed = asyncio.Event()

    def close(self) -> None:
        """Stop holding requests, because the gateway shuts down."""
        self._closed = True
        self.table_changed()

    @contextmanager
    def counted(self, model: Model) -> Iterator[None]:
        """Count a request while it waits or is answered."""
        key = (model.namespace, model.deployment)
        gauge = self._metrics.deployment_in_flight.labels(*key)
        self._running[key] += 1
        gauge.inc()
        self._touch(model, key)
        try:
            yield
        finally:
            self._running[key] -= 1
            gauge.dec()
            if not self._running[key]:
                del self._running[key]
            self._touch(model, key)

    def _touch(self, model: Model, key: Key) -> None:
        if model.idle_seconds is not None:
            known = self.activity.setdefault(key, Activity(model.idle_seconds))
            known.idle_seconds, known.newest = model.idle_seconds, time.monotonic()

    def holds(self, name: str) -> bool:
        """Return whether requests for this model wait."""
        return self._held[name] > 0

    async def hold(self, model: Model, find: Callable[[], tuple[Model, T | None]]) -> tuple[Model, T]:
        """Wait until `find` returns a target, for at most `hold_seconds`. `find` reads the newest table.

        Raises ApiError 503 if no target is found, or if too many requests wait already.
        """
        limit = self._settings.max_held
        if self._held[model.name] >= limit:
            raise unavailable(model.name, f"it is starting, and {limit} requests wait for it already", RETRY_AFTER)
        key = (model.namespace, model.deployment)
        self._held[model.name] += 1
        self._waiting[key] += 1
        held = self._metrics.held.labels(self._metrics.label(model.name))
        held.inc()
        self.news.set()
        deadline = time.monotonic() + self._settings.hold_seconds
        try:
            while True:
                changed = self._changed
                newest, found = find()
                if found is not None:
                    return newest, found
                left = deadline - time.monotonic()
                if newest.idle_seconds is None or self._closed or left <= 0:
                    reason = newest.why_not or "no replica has it loaded"
                    if left <= 0:
                        reason = f"no pod was ready within {self._settings.hold_seconds:.0f} s of the request: {reason}"
                    raise unavailable(model.name, reason, RETRY_AFTER)
                try:
                    await asyncio.wait_for(changed.wait(), left)
                except TimeoutError:
                    continue
        finally:
            self._held[model.name] -= 1
            self._waiting[key] -= 1
            held.dec()
            if not self._held[model.name]:
                del self._held[model.name]
            if not self._waiting[key]:
                del self._waiting[key]

    def due(self) -> list[Key]:
        """Return the deployments whose activity must be written now."""
        moment = time.monotonic()
        for key, known in self.activity.items():
            if self._running[key] > 0:
                known.newest = moment  # a deployment that is still answering is not idle
        return [key for key, known in self.activity.items() if known.due(moment, waiting=self._waiting[key] > 0)]

    def keep_only(self, deployments: set[Key]) -> None:
        """Forget deployments that no longer exist or may no longer sleep."""
        self.activity = {key: known for key, known in self.activity.items() if key in deployments}


class Reporter:
    """The writer of this gateway's keys in the ConfigMap graft-demand."""

    def __init__(self, configmaps: ConfigMaps, waiting: Waiting, name: str) -> None:
        self._configmaps = configmaps
        self._waiting = waiting
        self._name = name
        self._uid: str | None = None  # uid of the ConfigMap, which the operator creates

    async def run(self) -> None:
        """Write until cancelled. If a write fails, the activity stays due and the gateway retries."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._waiting.news.wait(), TICK_SECONDS)
            self._waiting.news.clear()
            try:
                for key in self._waiting.due():
                    await self._write(key)
            except KubeError as error:
                self._uid = None
                log.warning("the demand was not written, retrying: %s", error, extra={"status": error.status})
                await asyncio.sleep(RETRY_SECONDS)

    async def _write(self, key: Key) -> None:
        if self._uid is None:
            self._uid = str((await self._configmaps.get(DEMAND_CONFIGMAP))["metadata"]["uid"])
        known = self._waiting.activity.get(key)
        if known is None:
            return  # during an earlier write the deployment was deleted, or sleeping was switched off
        told = known.newest
        namespace, deployment = key
        entry = demand_key(namespace, deployment, self._name)
        demand = Demand(namespace=namespace, deployment=deployment, at=now())
        known.written = time.monotonic()  # failed writes count too, to spare the API server
        await self._configmaps.apply_key(
            DEMAND_CONFIGMAP,
            self._uid,
            entry,
            demand.json_text(),
            # Each key has its own field manager: an apply deletes the keys that its manager owns but does not send.
            manager=f"graft-gateway-{hashlib.sha256(entry.encode()).hexdigest()[:16]}",
        )
        known.told = told
