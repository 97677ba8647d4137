"""The agent's loop: compare the wanted adapters with the actual state, decide, act. Events only wake the loop.

The agent can be killed after any instruction, and needs no saved state to continue. Each folder on disk is a complete
version, an unfinished download, or a deletion that the next start finishes. The engine lists the loaded adapters.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from graft.bounded import OutOfBounds
from graft.contracts.agent import WANTED_KEY, Residency, Wanted, WantedAdapter

from graft_server.agent.decisions.decide import Observed, decide, loaded, unwanted_in_engine
from graft_server.agent.decisions.memory import Failures, Idleness
from graft_server.agent.decisions.reasons import OF_KEYS, OF_STORAGE
from graft_server.agent.decisions.room import Capacity, capacity
from graft_server.agent.engine.access import Access
from graft_server.agent.engine.client import EngineClient, EngineDown
from graft_server.agent.engine.view import EngineView
from graft_server.agent.report.metrics import Metrics
from graft_server.agent.report.residency import resident_adapters
from graft_server.agent.settings import MAX_ADAPTER_BYTES
from graft_server.agent.storage.folders import Contents, Folders
from graft_server.agent.storage.objects import Objects
from graft_server.agent.storage.trust import Trust
from graft_server.agent.work import Work
from graft_server.configmaps import Snapshot

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
SCRAPE_SECONDS = 1.0  # between two reads of the engine's metrics for Prometheus


class Agent:
    """One pod's agent."""

    def __init__(
        self,
        *,
        pod: str,
        pod_uid: str,
        adapters_dir: Path,
        base_model_name: str | None,
        engine: EngineClient,
        access: Access | None = None,  # None: the engine answers everybody
        open_store: Callable[[], Objects],
        storage_changed: Callable[[], bool],
        publish: Callable[[Residency], None],
        cache_bytes: int | None = None,
        max_adapter_bytes: int = MAX_ADAPTER_BYTES,
        trust: Trust | None = None,  # None: signatures are not checked
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.metrics = Metrics()
        self._pod, self._pod_uid = pod, pod_uid
        self._dir = str(adapters_dir)
        self._storage_changed = storage_changed
        self._publish = publish
        self._cache_bytes = cache_bytes
        self._trust = trust
        self._access = access
        self._client = engine
        self._scraping = asyncio.Lock()
        self._scraped: str | EngineDown = ""
        self._scraped_at = float("-inf")
        self._poll = poll_seconds
        self._wanted: Wanted | None = None  # the part for this pod
        self._why_nothing = "the agent has not read the wanted adapters yet"
        self._folders = Folders(adapters_dir)
        self._contents = Contents()
        self._failures = Failures()
        self._idleness = Idleness()
        self._engine = EngineView(engine, base_model_name, self._dir, self.metrics, self._failures, self._unchecked)
        self._wake = asyncio.Event()
        self._looped_at = time.monotonic()
        self._work = Work(
            self._folders,
            engine,
            open_store,
            max_adapter_bytes,
            self.metrics,
            self._failures,
            still_wanted=self._still_wanted,
            max_rank=lambda: self._wanted.max_lora_rank if self._wanted else 0,
            base_model=lambda: base_model_name or (self._wanted.base_model if self._wanted else ""),
            engine_died=self._engine.died,
            ended=self._wake.set,
            trust=trust,
        )

    # Events that wake the loop

    def want(self, configmaps: Snapshot) -> None:
        """Take this pod's part of the wanted ConfigMap.

        If the ConfigMap does not exist, is invalid or does not assign adapters to this pod, nothing changes.
        """
        for data in configmaps.values():
            try:
                everything = Wanted.read(data.get(WANTED_KEY) or "")
            except OutOfBounds as error:
                self.metrics.failures.labels("WantedInvalid").inc()
                log.error("%s is invalid and is ignored: %s", WANTED_KEY, error)
                continue
            if self._access is not None:
                self._access.admit(everything.gateway_keys)
            wanted = everything.for_pod(self._pod)
            if wanted is None:
                self._why_nothing = "waiting for the operator to assign adapters to this pod"
            elif wanted != self._wanted:
                names = [adapter.engine_name for adapter in wanted.adapters]
                log.info("%d adapters are wanted", len(names), extra={"adapters": names})
                if self._wanted is None or wanted.max_lora_rank != self._wanted.max_lora_rank:
                    self._work.forget_all_but(())  # they were inspected with another maxLoraRank
                for early in self._wanted.expected if self._wanted else ():
                    self._failures.clear(early.engine_name)  # they do not count when the version is wanted
                self._wanted = wanted
                self._failures.retry_now()
                self._wake.set()

    def trusted_keys(self, configmaps: Snapshot) -> None:
        """Take the public keys from their ConfigMap."""
        if self._trust is not None and self._trust.take(configmaps):
            self._failures.retry_now(OF_KEYS)
            self._wake.set()

    async def run(self) -> None:
        """Run rounds until cancelled."""
        if graves := self._folders.open():
            log.info("finished the deletions that an earlier run had started", extra={"folders": graves})
        self._work.unchecked |= self._folders.unchecked()
        while True:
            self._wake.clear()
            try:
                await self.tick()
            except Exception:
                self.metrics.failures.labels("InternalError").inc()
                log.exception("a round failed; the next round starts from the actual state")
            self._looped_at = time.monotonic()
            retry = self._failures.next_retry(self._looped_at)
            try:
                async with asyncio.timeout(min(self._poll, retry if retry else self._poll)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Stop all running actions."""
        self._work.stop()

    # Probes

    @property
    def loop_age(self) -> float:
        """Return the seconds since the last round ended."""
        return time.monotonic() - self._looped_at

    async def not_ready(self) -> str | None:
        """Return why the pod must not receive requests, or None if it may. Ask the engine if its last answer is old."""
        if self._engine.stale:
            await self._observe()
        if self._wanted is None:
            return self._why_nothing
        if self._trust is not None and not self._trust.read:
            return "the agent has not read the trusted keys yet"
        if not self._engine.answering:
            return self._engine.why_not
        if not self._engine.ready(self._wanted):
            missing = [a.adapter for a in self._wanted.adapters if not loaded(a, self._engine.working, self._dir)]
            return "waiting for adapters: " + ", ".join(missing)
        return None

    async def engine_metrics(self) -> str:
        """Return the engine's Prometheus metrics. Raises EngineDown.

        The engine is asked at most once per second, whoever asks the agent.
        """
        async with self._scraping:
            if time.monotonic() - self._scraped_at > SCRAPE_SECONDS:
                try:
                    self._scraped = await self._client.exposition()
                except EngineDown as error:
                    self._scraped = error
                self._scraped_at = time.monotonic()
            if isinstance(self._scraped, EngineDown):
                raise self._scraped
            return self._scraped

    # One round

    async def tick(self) -> None:
        """Run one round: observe, decide, start the actions, report."""
        # Taken before the observation: the result of an action that ends meanwhile may be missing in what is observed.
        busy, deleting = self._work.running, self._work.deleting
        await self._observe()
        self._contents = self._folders.contents()
        room = self._capacity()
        if self._storage_changed():
            log.info("the storage Secret has changed; adapters that failed because of the store are retried")
            self._failures.retry_now(OF_STORAGE)
        if self._wanted is not None and (self._trust is None or self._trust.read):
            await self._step(self._wanted, busy, deleting, room)
        self._tell(room)

    async def _step(self, wanted: Wanted, busy: frozenset[str], deleting: bool, room: Capacity) -> None:
        engine = self._engine.models if self._engine.answering else None
        there = self._contents
        now = time.monotonic()
        leaving = unwanted_in_engine(wanted, engine or {})
        self._idleness.see(leaving, await self._engine.active() if leaving else frozenset(), now)
        names = {adapter.engine_name for adapter in (*wanted.adapters, *wanted.expected)}
        self._failures.keep_only(names | set(there.complete) | set(self._engine.models or {}))
        self._work.forget_all_but((*wanted.adapters, *wanted.expected))
        seen = Observed(
            on_disk=there.complete,
            engine=engine,
            busy=busy | self._work.running,
            held_back=self._failures.held_back(now),
            failed=self._failures.names,
            drained=self._idleness.drained(wanted.drain_seconds, now),
            sizes={name: version.size_bytes for name, version in self._work.versions.items()},
            partial=there.partial,
            capacity=room,
            deleting=deleting,
            unchecked=self._unchecked(),
        )
        for action in decide(wanted, seen, self._dir):
            self._work.start(action)

    async def _observe(self) -> None:
        if await self._engine.observe(self._wanted, self._work.running):
            self._wake.set()

    def _unchecked(self) -> set[str]:
        return self._work.unchecked

    def _capacity(self) -> Capacity:
        free, disk = self._folders.free_bytes()
        return capacity(self._cache_bytes, self._contents.bytes, free, disk)

    def _tell(self, room: Capacity) -> None:
        wanted, there = self._wanted, self._contents
        adapters = resident_adapters(
            wanted,
            self._engine.working,
            self._dir,
            there.complete,
            self._work.running,
            self._failures,
            self._work.load_seconds,
            self._work.notes,
        )
        names = {adapter.engine_name for adapter in wanted.adapters} if wanted else set()
        kept = sum(folder.size_bytes for name, folder in there.complete.items() if name not in names)
        self.metrics.show(adapters)
        self.metrics.cache_bytes.labels("kept").set(kept)
        self.metrics.cache_bytes.labels("wanted").set(there.bytes - kept)
        self.metrics.cache_limit.set(room.total)
        ready = self._engine.ready(wanted)
        self.metrics.ready.set(ready)
        if wanted is None:
            return
        self._publish(
            Residency(
                pod=self._pod,
                pod_uid=self._pod_uid,
                ready=ready,
                engine_started=self._engine.started,
                certificate=self._access.certificate if self._access else None,
                adapters=adapters,
            )
        )

    def _still_wanted(self, adapter: WantedAdapter) -> bool:
        """Return whether a download may continue. The download threads call this.

        The download of an expected version stops if a wanted adapter is missing.
        """
        wanted, there = self._wanted, self._contents.complete.keys() | self._failures.names
        if wanted is None:
            return False
        if any(adapter.same_files(item) for item in wanted.adapters):
            return True
        missing = any(item.engine_name not in there for item in wanted.adapters)
        return not missing and any(adapter.same_files(item) for item in wanted.expected)
