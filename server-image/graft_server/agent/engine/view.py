"""The state of the engine as the agent last observed it: its models, restarts, and whether the pod is ready."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from graft.contracts.agent import Wanted

from graft_server.agent.decisions.memory import Failures, Readiness
from graft_server.agent.decisions.reasons import OF_ENGINE
from graft_server.agent.engine.client import EngineClient, EngineDown, active_adapters, process_start
from graft_server.agent.report.metrics import Metrics

log = logging.getLogger(__name__)

TOLERATED_MISSES = 3  # failed requests in a row after which the engine's last answer is discarded
FRESH_SECONDS = 0.5  # age up to which an observation may answer a probe


class EngineView:
    """The engine as it was last observed."""

    def __init__(
        self,
        client: EngineClient,
        base_model: str | None,
        adapters_dir: str,
        metrics: Metrics,
        failures: Failures,
        unchecked: Callable[[], Collection[str]],
    ) -> None:
        """Create the view. `unchecked` returns the adapters that may be loaded and are not known to work."""
        self._client = client
        self._base = base_model
        self._dir = adapters_dir
        self._metrics = metrics
        self._failures = failures
        self._unchecked = unchecked
        self._readiness = Readiness()
        self._gone = False
        self._misses = 0
        self._process: float | None = None
        self._observing = asyncio.Lock()
        self._observed_at = float("-inf")
        self.models: dict[str, str] | None = None  # the last listing; None if it is no longer reliable
        self.answering = False
        self.why_not = "the agent has not asked the engine yet"
        self.started: str | None = None  # changes when the engine restarts

    @property
    def working(self) -> dict[str, str] | None:
        """Return the listed models without the adapters that are not known to work. None like `models`."""
        unchecked = self._unchecked()
        return None if self.models is None else {name: at for name, at in self.models.items() if name not in unchecked}

    @property
    def stale(self) -> bool:
        """Return whether the last observation is too old to answer a probe."""
        return time.monotonic() - self._observed_at > FRESH_SECONDS

    def ready(self, wanted: Wanted | None) -> bool:
        """Return whether the engine lists the base model, and each adapter wanted at its start is loaded or Failed."""
        if self.models is None or wanted is None or (self._base is not None and self._base not in self.models):
            return False
        return self._readiness.complete

    async def observe(self, wanted: Wanted | None, busy: Collection[str]) -> bool:
        """Ask the engine for its models. Return whether its readiness or its start time has changed."""
        async with self._observing:
            before = (self.ready(wanted), self.started)
            try:
                models = await self._client.models()
            except EngineDown as error:
                self.answering, self.why_not = False, f"the engine does not answer: {error}"
                self._gone = self._gone or error.gone
                self._misses += 1
                if error.gone or self._misses >= TOLERATED_MISSES:
                    self.models = None
            else:
                await self._see(wanted, busy, models)
            self._observed_at = time.monotonic()
            self._metrics.engine_up.set(self.answering)
            return before != (self.ready(wanted), self.started)

    async def _see(self, wanted: Wanted | None, busy: Collection[str], models: dict[str, str]) -> None:
        other = self._gone and await self._another_process()
        if self._readiness.restarted(wanted, models, self._dir, busy, other):
            self._process = await self._process_start()
            started = datetime.fromtimestamp(self._process or time.time(), UTC).isoformat(timespec="milliseconds")
            log.info("the engine started", extra={"engine_started": started, "models": sorted(models)})
            self._metrics.restarts.inc()
            self._readiness.start()
            self._failures.retry_now(OF_ENGINE)  # the new process may have another version or other flags
            self.started = started
        self._gone, self._misses, self.models = False, 0, models
        self.answering = self._base is None or self._base in models
        if not self.answering:
            self.why_not = f"the engine does not serve {self._base}: it lists {', '.join(sorted(models)) or 'nothing'}"
        self._readiness.see(wanted, self.working or {}, self._dir, self._failures)

    async def _process_start(self) -> float | None:
        try:
            return process_start(await self._client.exposition())
        except (EngineDown, ValueError):
            return None

    async def _another_process(self) -> bool:
        now = await self._process_start()
        return now is None or now != self._process

    async def active(self) -> frozenset[str] | None:
        """Return the adapters that running or waiting requests use, or None if the metrics are not readable."""
        try:
            return active_adapters(await self._client.exposition())
        except (EngineDown, ValueError) as error:
            log.warning("cannot read which adapters the engine's requests use, so no adapter is unloaded: %s", error)
            return None

    async def died(self) -> str | None:
        """Return the error if the engine does not answer now, else None."""
        try:
            await self._client.models()
        except EngineDown as error:
            return str(error)
        return None
