"""Run the decided actions, each in its own task, and record each failure with its reason."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from graft.artifacts.manifest import ManifestFile
from graft.contracts.agent import WantedAdapter

from graft_server.agent.decisions.decide import Action, Delete, Discard, Download, Inspect, Load, Refuse, Unload
from graft_server.agent.decisions.effect import check_effect
from graft_server.agent.decisions.memory import Failures
from graft_server.agent.decisions.reasons import FAILED, AdapterError, AdapterReason
from graft_server.agent.engine.client import EngineClient, EngineDown, EngineRefused, EngineSlow
from graft_server.agent.report.metrics import Metrics
from graft_server.agent.slots import Slots
from graft_server.agent.storage.download import NotWanted, Version, fetch_file, finish, inspect
from graft_server.agent.storage.folders import Folders
from graft_server.agent.storage.objects import Objects
from graft_server.agent.storage.trust import Trust

log = logging.getLogger(__name__)

ADAPTERS = 6  # concurrent downloads of versions
FILES = 4  # concurrent downloads of files per version: the weights and smaller files
INSPECTIONS = 12  # concurrent reads of manifests
LOADS = 4  # concurrent loads
FOR_NEW = 2  # slots of each kind that are reserved for adapters that have not failed before
THREADS = INSPECTIONS + ADAPTERS * FILES + 4

T = TypeVar("T")


class Work:
    """The running actions, at most one per adapter, and the results that later actions need."""

    def __init__(
        self,
        folders: Folders,
        engine: EngineClient,
        open_store: Callable[[], Objects],
        max_adapter_bytes: int,
        metrics: Metrics,
        failures: Failures,
        *,
        still_wanted: Callable[[WantedAdapter], bool],
        max_rank: Callable[[], int],
        base_model: Callable[[], str],
        engine_died: Callable[[], Awaitable[str | None]],
        ended: Callable[[], None],
        trust: Trust | None = None,  # None: signatures are not checked
    ) -> None:
        self._folders = folders
        self._engine = engine
        self._open_store = open_store
        self._max_adapter_bytes = max_adapter_bytes
        self._metrics = metrics
        self._failures = failures
        self._still_wanted = still_wanted
        self._max_rank = max_rank
        self._base_model = base_model
        self._engine_died = engine_died
        self._ended = ended
        self._trust = trust
        self._actions: dict[str, Action] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="download")
        self._downloads = Slots(ADAPTERS, ADAPTERS - FOR_NEW)
        self._inspections = Slots(INSPECTIONS, INSPECTIONS - FOR_NEW)
        self._loads = Slots(LOADS, LOADS - FOR_NEW)
        self._asking = asyncio.Lock()  # held while an adapter's effect is measured
        self._began: dict[str, float] = {}
        self._stopping = False
        self.versions: dict[str, Version] = {}  # inspected versions, by engine name
        self._early: dict[str, float] = {}  # seconds of the downloads of versions that were only expected
        self.load_seconds: dict[str, float] = {}
        self.unchecked: set[str] = set()  # adapters that the engine may have and that are not known to work
        self.notes: dict[str, str | None] = {}  # by loaded adapter: why its effect was not compared

    @property
    def running(self) -> frozenset[str]:
        """Return the engine names for which an action runs."""
        return frozenset(self._actions)

    @property
    def deleting(self) -> bool:
        """Return whether a kept version is being deleted."""
        return any(isinstance(action, Delete) for action in self._actions.values())

    def start(self, action: Action) -> None:
        """Start an action. `ended` is called when the action has ended."""
        name = action.name
        if isinstance(action, Refuse):
            self._refuse(action)
            return
        failure = self._failures.get(name)
        if isinstance(action, Download) and failure and failure.reason == AdapterReason.DISK_FULL:
            self._failures.clear(name)  # it fits now
        task = asyncio.create_task(self._run(action), name=f"{type(action).__name__} {name}")
        self._actions[name] = action
        self._tasks.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._actions.pop(name, None)
            self._tasks.discard(task)
            self._ended()

        task.add_done_callback(over)

    def stop(self) -> None:
        """Cancel all tasks and stop the download threads."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def forget_all_but(self, adapters: Collection[WantedAdapter]) -> None:
        """Forget the inspected versions of all other adapters, and those of `adapters` whose files have changed."""
        known = {adapter.engine_name: adapter for adapter in adapters}
        self.versions = {
            name: version
            for name, version in self.versions.items()
            if name in known and version.adapter.same_files(known[name])
        }

    async def _run(self, action: Action) -> None:
        name, verb = action.name, type(action).__name__.lower()
        started = time.monotonic()
        try:
            await self._act(action)
        except NotWanted:
            self._metrics.downloads.labels("abandoned").inc()
            log.info("the download of %s was stopped: it is no longer wanted, or a wanted adapter comes first", name)
        except AdapterError as error:
            self._failed(name, verb, error.reason, str(error), retry_after=error.retry_after)
        except EngineDown as error:
            self._failed(name, verb, AdapterReason.ENGINE_UNAVAILABLE, str(error))
        except EngineSlow as error:
            self._failed(name, verb, AdapterReason.ENGINE_TIMEOUT, str(error))
        except EngineRefused as error:
            if error.status >= 500 and (died := await self._engine_died()):
                self._failed(name, verb, AdapterReason.ENGINE_UNAVAILABLE, f"{error}; then {died}")
            else:
                self._failed(name, verb, AdapterReason.ENGINE_REJECTED, f"{error.status} {error}")
        except Exception as error:
            log.exception("%s of %s failed", verb, name)
            self._failed(name, verb, AdapterReason.INTERNAL_ERROR, repr(error))
        else:
            if not isinstance(action, Inspect):  # the download may fail for the same reason
                self._failures.clear(name)
            seconds = round(time.monotonic() - started, 3)
            log.info("%s of %s is done", verb, name, extra={"action": verb, "adapter": name, "seconds": seconds})

    async def _act(self, action: Action) -> None:
        name, again = action.name, self._failures.get(action.name) is not None
        match action:
            case Inspect(adapter, expected):
                if expected:
                    await self._check_place(adapter)
                else:
                    self._check(adapter)
                    self._began.setdefault(name, time.monotonic())
                async with self._inspections.turn(again=again):
                    self.versions[name] = await self._thread(
                        inspect, self._open_store, adapter, self._max_rank(), self._max_adapter_bytes
                    )
            case Download():
                async with self._downloads.turn(again=again):
                    await self._download(self.versions[name])
            case Load(adapter):
                self._check(adapter)  # the trusted keys may have changed since the download
                async with self._loads.turn(again=again):
                    await self._load(name)
            case Unload():
                await self._engine.unload(name)
                self._metrics.unloads.inc()
                self.load_seconds.pop(name, None)
                self.notes.pop(name, None)
                self.unchecked.discard(name)
                await self._thread(self._folders.touch, name)
            case Delete():
                await self._thread(self._folders.delete, name)
                self._metrics.evictions.inc()
            case Discard():
                await self._thread(self._folders.discard, name)
                self._began.pop(name, None)
                self._early.pop(name, None)

    def _check(self, adapter: WantedAdapter) -> None:
        if self._trust is not None:
            self._trust.check(adapter)

    async def _check_place(self, adapter: WantedAdapter) -> None:
        if self._trust is not None:
            store = await self._thread(self._open_store)
            self._trust.check_place(adapter, store.config.bucket)

    async def _download(self, version: Version) -> None:
        name, started = version.adapter.engine_name, time.monotonic()
        folder = await self._thread(self._folders.partial, name)
        hopeless: list[AdapterError] = []
        width = asyncio.Semaphore(FILES)

        def may_continue() -> bool:
            return not hopeless and not self._stopping and self._still_wanted(version.adapter)

        async def one(file: ManifestFile) -> None:
            async with width:
                try:
                    moved = await self._thread(fetch_file, self._open_store, version, file, folder, may_continue)
                except AdapterError as error:
                    hopeless.extend([error] if error.reason in FAILED else [])
                    raise
            self._metrics.resumed_bytes.inc(moved.kept)

        largest_first = sorted(version.files, key=lambda file: -file.size)
        try:
            # Wait for all of them: a thread cannot be stopped, and it writes into the folder.
            ended = await asyncio.gather(*(one(file) for file in largest_first), return_exceptions=True)
            errors = [error for error in ended if error is not None]
            # After a hopeless error the other files end with NotWanted, so NotWanted is sorted last.
            for error in sorted(errors, key=lambda error: isinstance(error, NotWanted)):
                raise error
            await self._thread(finish, self._folders, version)
        except AdapterError as error:
            self._metrics.downloads.labels("failed").inc()
            if error.reason in FAILED:
                await self._thread(self._folders.discard, name)
            raise
        self._metrics.downloads.labels("done").inc()
        self._metrics.bytes.inc(version.size_bytes)
        seconds = time.monotonic() - started
        self._metrics.load_seconds.labels("download").observe(seconds)
        if name not in self._began:
            self._early[name] = seconds

    async def _load(self, name: str) -> None:
        started = time.monotonic()
        self.unchecked.add(name)  # before the engine lists it: until it was found to work, it gets no requests
        await self._thread(self._folders.mark_unchecked, name)
        await self._engine.load(name, str(self._folders.place(name)))
        try:
            note = await self._effect(name)
        except (AdapterError, EngineRefused):
            await self._engine.unload(name)
            raise
        await self._thread(self._folders.mark_checked, name)
        self.unchecked.discard(name)
        self.notes[name] = note
        if note is not None:
            log.info("%s is loaded. %s", name, note, extra={"adapter": name})
        now = time.monotonic()
        # The files may have been downloaded while the version was only expected.
        began = self._began.pop(name, started - self._early.get(name, 0.0))
        self._metrics.load_seconds.labels("load").observe(now - started)
        self._metrics.load_seconds.labels("all").observe(now - began)
        self.load_seconds[name] = round(now - began, 3)

    async def _effect(self, name: str) -> str | None:
        """Compare the loaded adapter with the record of its effect. Return why nothing was compared, or None.

        Raises AdapterError if the adapter does not do what it did when it was published.
        """
        effect = await self._thread(self._folders.effect, name)
        if effect is None:
            return check_effect(None, [], [])
        prompts = [prompt.prompt for prompt in effect.prompts]
        # One request after the other, also of several adapters that are loaded at once: vLLM on a CPU applies an adapter to
        # the base model's requests of the same batch.
        async with self._asking:
            try:
                base = await self._engine.next_tokens(self._base_model(), prompts)
            except EngineRefused as error:
                # An engine that cannot answer this about its base model says nothing about adapters.
                return f"its effect was not checked: the engine refused the test prompts for its base model: {error}"
            adapter = await self._engine.next_tokens(name, prompts)
        return check_effect(effect, base, adapter)

    async def _thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(work, *arguments))

    def _refuse(self, action: Refuse) -> None:
        if self._failures.note(action.name, AdapterReason.DISK_FULL, action.message):
            self._metrics.failures.labels(AdapterReason.DISK_FULL).inc()
            log.warning("%s does not fit on the disk: %s", action.name, action.message, extra={"adapter": action.name})

    def _failed(
        self, name: str, verb: str, reason: AdapterReason, message: str, *, retry_after: float | None = None
    ) -> None:
        self._metrics.failures.labels(reason).inc()
        failure = self._failures.add(name, reason, message, time.monotonic(), retry_after=retry_after)
        log.warning(
            "%s of %s failed: %s",
            verb,
            name,
            message,
            extra={
                "action": verb,
                "adapter": name,
                "reason": reason,
                "attempt": failure.attempts,
                "retry_seconds": round(failure.retry_at - time.monotonic(), 1),
            },
        )
