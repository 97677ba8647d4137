"""The agent's loop: look at what is wanted and what is there, decide, act. Level-triggered: an event only wakes it.

It can be killed after any instruction. Nothing it remembers is needed to go on: the files on disk are complete or are
cleaned away, and what is loaded is asked of the engine.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from graft.artifacts.store import S3Store
from graft.contracts import WANTED_KEY, Residency, Wanted, WantedAdapter
from pydantic import ValidationError

from graft_server.agent import decide as decisions
from graft_server.agent.decide import Action, Delete, Download, Load, Observed, Unload, decide, path_of
from graft_server.agent.download import (
    AdapterError,
    NotWanted,
    clean_partials,
    complete_folders,
    delete_adapter,
    fetch_adapter,
)
from graft_server.agent.engine import EngineClient, EngineDown, EngineRefused, active_adapters, process_start
from graft_server.agent.memory import Failures, Idleness, Readiness
from graft_server.agent.metrics import Metrics
from graft_server.agent.residency import resident_adapters
from graft_server.configmaps import Snapshot

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
PARALLEL = 4  # downloads at once, and as many loads
TOLERATED_MISSES = 3  # answers that may time out in a row before the operator is told that the engine is away


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
        open_store: Callable[[], S3Store],
        publish: Callable[[Residency], None],
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.metrics = Metrics()
        self._pod, self._pod_uid = pod, pod_uid
        self._dir = adapters_dir
        self._base = base_model_name
        self._engine = engine
        self._open_store = open_store
        self._publish = publish
        self._poll = poll_seconds
        self._wanted: Wanted | None = None
        self._models: dict[str, str] | None = None  # what the engine listed last
        self._answering = False
        self._why_not = "the engine was not asked yet"
        self._gone = False
        self._misses = 0
        self._process: float | None = None
        self._engine_started: str | None = None
        self._failures = Failures()
        self._idleness = Idleness()
        self._readiness = Readiness()
        self._began: dict[str, float] = {}
        self._load_seconds: dict[str, float] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._observing = asyncio.Lock()
        self._observed_at = float("-inf")
        self._looped_at = time.monotonic()
        self._threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="download")
        self._loads = asyncio.Semaphore(PARALLEL)
        self._stopping = False

    # What wakes it

    def want(self, configmaps: Snapshot) -> None:
        """Take what the wanted ConfigMap says. One that is gone or unreadable changes nothing."""
        for data in configmaps.values():
            try:
                wanted = Wanted.model_validate_json(data.get(WANTED_KEY) or "")
            except ValidationError as error:
                self.metrics.failures.labels("WantedInvalid").inc()
                log.error("%s makes no sense and is ignored: %s", WANTED_KEY, error.errors()[0]["msg"])
                continue
            if wanted != self._wanted:
                names = [adapter.engine_name for adapter in wanted.adapters]
                log.info("%d adapters are wanted", len(names), extra={"adapters": names})
                self._wanted = wanted
                self._failures.retry_now()
                self._wake.set()

    async def run(self) -> None:
        """Loops until it is cancelled."""
        self._dir.mkdir(parents=True, exist_ok=True)
        if leftovers := clean_partials(self._dir):
            log.info("removed what an earlier run left behind", extra={"folders": leftovers})
        while True:
            self._wake.clear()
            try:
                await self.tick()
            except Exception:
                self.metrics.failures.labels("InternalError").inc()
                log.exception("a round failed; the next one starts from what is there")
            self._looped_at = time.monotonic()
            retry = self._failures.next_retry(self._looped_at)
            try:
                async with asyncio.timeout(min(self._poll, retry if retry else self._poll)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Let no download go on."""
        self._stopping = True
        for task in self._running.values():
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # What others ask

    @property
    def loop_age(self) -> float:
        """Seconds since the loop last came round."""
        return time.monotonic() - self._looped_at

    async def not_ready(self) -> str | None:
        """Why the pod may get no traffic, asked of the engine now; None when it may."""
        if time.monotonic() - self._observed_at > 0.5:
            await self.observe()
        if self._wanted is None:
            return "what is wanted was not read yet"
        if not self._answering:
            return self._why_not
        if not self._ready:
            return "waiting for adapters: " + ", ".join(self._missing())
        return None

    # One round

    async def tick(self) -> None:
        """Look, decide, start what is to be done, tell."""
        busy = set(self._running)  # before looking: what ends meanwhile may not be in the picture yet
        await self.observe()
        wanted, engine = self._wanted, self._models if self._answering else None
        if wanted is not None:
            on_disk = complete_folders(self._dir)
            now = time.monotonic()
            leaving = decisions.unwanted_in_engine(wanted, engine or {})
            self._idleness.see(leaving, await self._active() if leaving else frozenset(), now)
            self._failures.keep_only(
                {adapter.engine_name for adapter in wanted.adapters} | set(on_disk) | set(self._models or {})
            )
            seen = Observed(
                on_disk={name: folder.digest for name, folder in on_disk.items()},
                engine=engine,
                busy=busy | set(self._running),
                held_back=self._failures.held_back(now),
                drained=self._idleness.drained(wanted.drain_seconds, now),
            )
            for action in decide(wanted, seen, str(self._dir)):
                self._start(action)
        self._tell()

    async def observe(self) -> None:
        """Ask the engine what it is and has."""
        async with self._observing:
            before = (self._ready, self._engine_started)
            try:
                models = await self._engine.models()
            except EngineDown as error:
                self._answering, self._why_not = False, f"the engine does not answer: {error}"
                self._gone = self._gone or error.gone
                self._misses += 1
                if error.gone or self._misses >= TOLERATED_MISSES:
                    self._models = None
            else:
                await self._see(models)
            self._observed_at = time.monotonic()
            self.metrics.engine_up.set(self._answering)
            if before != (self._ready, self._engine_started):
                self._wake.set()

    async def _see(self, models: dict[str, str]) -> None:
        other = self._gone and await self._another_process()
        if self._readiness.restarted(self._wanted, models, str(self._dir), self._running, other):
            self._process = await self._process_start()
            started = datetime.fromtimestamp(self._process or time.time(), UTC).isoformat(timespec="milliseconds")
            log.info("the engine started", extra={"engine_started": started, "models": sorted(models)})
            self.metrics.restarts.inc()
            self._readiness.start()
            self._engine_started = started
            self._load_seconds.clear()
        self._gone, self._misses, self._models = False, 0, models
        self._answering = self._base is None or self._base in models
        if not self._answering:
            self._why_not = f"the engine does not serve {self._base}: it lists {', '.join(sorted(models)) or 'nothing'}"
        self._readiness.see(self._wanted, models, str(self._dir), self._failures)

    async def _process_start(self) -> float | None:
        try:
            return process_start(await self._engine.exposition())
        except (EngineDown, ValueError):
            return None

    async def _another_process(self) -> bool:
        now = await self._process_start()
        return now is None or now != self._process

    async def _active(self) -> frozenset[str] | None:
        try:
            return active_adapters(await self._engine.exposition())
        except (EngineDown, ValueError) as error:
            log.warning("what runs in the engine is not known, so nothing is unloaded: %s", error)
            return None

    @property
    def _ready(self) -> bool:
        if self._models is None or self._wanted is None or (self._base is not None and self._base not in self._models):
            return False
        return self._readiness.complete

    def _missing(self) -> list[str]:
        adapters = self._wanted.adapters if self._wanted else []
        return [a.adapter for a in adapters if not decisions.loaded(a, self._models, str(self._dir))]

    def _tell(self) -> None:
        on_disk = complete_folders(self._dir)
        adapters = resident_adapters(
            self._wanted, self._models, str(self._dir), on_disk, self._running, self._failures, self._load_seconds
        )
        self.metrics.show(adapters)
        self.metrics.ready.set(self._ready)
        if self._wanted is None:
            return
        self._publish(
            Residency(
                pod=self._pod,
                pod_uid=self._pod_uid,
                ready=self._ready,
                engine_started=self._engine_started,
                adapters=adapters,
            )
        )

    # Actions

    def _start(self, action: Action) -> None:
        name = action.name
        task = asyncio.create_task(self._run(action), name=f"{type(action).__name__} {name}")
        self._running[name] = task

        def ended(_: asyncio.Task[None]) -> None:
            self._running.pop(name, None)
            self._wake.set()

        task.add_done_callback(ended)

    async def _run(self, action: Action) -> None:
        name, verb = action.name, type(action).__name__.lower()
        started = time.monotonic()
        try:
            await self._act(action)
        except NotWanted:
            log.info("%s is not wanted any more; its download ended", name)
            return
        except AdapterError as error:
            self._failed(name, verb, error.reason, str(error), permanent=error.permanent)
        except EngineDown as error:
            self._failed(name, verb, "EngineUnavailable", str(error), permanent=False)
        except EngineRefused as error:
            down = await self._engine_died() if error.status >= 500 else None
            if down:
                self._failed(name, verb, "EngineUnavailable", f"{error}; then {down}", permanent=False)
            else:
                self._failed(name, verb, "EngineRejected", f"{error.status} {error}", permanent=True)
        except Exception as error:
            log.exception("%s of %s failed", verb, name)
            self._failed(name, verb, "InternalError", repr(error), permanent=False)
        else:
            self._failures.clear(name)
            seconds = round(time.monotonic() - started, 3)
            log.info("%s of %s is done", verb, name, extra={"action": verb, "adapter": name, "seconds": seconds})

    async def _engine_died(self) -> str | None:
        try:
            await self._engine.models()
        except EngineDown as error:
            return str(error)
        return None

    async def _act(self, action: Action) -> None:
        started = time.monotonic()
        match action:
            case Download(adapter):
                self._began.setdefault(action.name, started)
                work = partial(
                    fetch_adapter,
                    self._open_store,
                    adapter,
                    self._wanted.max_lora_rank if self._wanted else 0,
                    self._dir,
                    partial(self._still_wanted, adapter),
                )
                folder = await asyncio.get_running_loop().run_in_executor(self._threads, work)
                self.metrics.bytes.inc(folder.size_bytes)
                self.metrics.load_seconds.labels("download").observe(time.monotonic() - started)
            case Load(adapter):
                began = self._began.setdefault(action.name, started)
                async with self._loads:
                    await self._engine.load(action.name, path_of(str(self._dir), action.name))
                now = time.monotonic()
                self.metrics.load_seconds.labels("load").observe(now - started)
                self.metrics.load_seconds.labels("all").observe(now - began)
                self._load_seconds[action.name] = round(now - began, 3)
                self._began.pop(action.name, None)
            case Unload(name):
                await self._engine.unload(name)
                self.metrics.unloads.inc()
                self._load_seconds.pop(name, None)
            case Delete(name):
                delete_adapter(self._dir, name)
                self._began.pop(name, None)

    def _still_wanted(self, adapter: WantedAdapter) -> bool:
        return not self._stopping and self._wanted is not None and adapter in self._wanted.adapters

    def _failed(self, name: str, verb: str, reason: str, message: str, *, permanent: bool) -> None:
        self.metrics.failures.labels(reason).inc()
        failure = self._failures.add(name, reason, message, permanent=permanent, now=time.monotonic())
        log.warning(
            "%s of %s failed: %s",
            verb,
            name,
            message,
            extra={
                "action": verb,
                "adapter": name,
                "reason": reason,
                "permanent": permanent,
                "attempt": failure.attempts,
                "retry_seconds": round(failure.retry_at - time.monotonic(), 1),
            },
        )
