"""Follow the objects of one kind: a list page by page, then a watch. It hands on what it receives, and holds nothing.

After an interruption the watch continues at the last version that was seen. Only if the API server no longer has that
version, or refuses the watch, everything is listed again. The receiver compares such a list with what it holds, so it
notices what was deleted meanwhile.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from graft import metrics
from graft.cache.objects import Place, place_of
from graft.kinds import WrongAnswer
from graft.kube import Kube, KubeError, Manifest

log = logging.getLogger(__name__)

PAUSE_FIRST, PAUSE_LAST = 0.5, 30.0  # seconds until a failed list or watch is repeated
PAUSE_LISTED = 5.0  # seconds; the longest pause while lists succeed, unless they take long
LIST_SHARE = 0.1  # of the time; no more of it is spent with lists that watches need again and again
ABSENT = 404  # status of a list of a kind that the API server does not know. It answers 503 until it knows all kinds
BUSY = {429, 503}  # the API server refuses a watch whose version it may still have
BROKEN = (KubeError, WrongAnswer, aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError)


@dataclass(frozen=True)
class Source:
    """Which objects are followed, and how much of each.

    `labels`: their label selector; None as a value means any value. `only`: namespace and name of a single object.
    `listed`, `watched`: whether lists and events have the whole objects, or only their metadata. `every_label`: whether all
    labels are held of metadata, and not only Graft's. `optional`: the kind may not exist in the cluster, and has no objects
    then. `group`, `facts`: see Objects.
    """

    kind: str
    name: str = ""  # in the log and the probe; by default the kind
    labels: dict[str, str | None] = field(default_factory=dict)
    only: tuple[str, str] | None = None
    listed: bool = True
    watched: bool = True
    every_label: bool = False
    optional: bool = False
    group: Callable[[Manifest], str] | None = None
    facts: Callable[[Manifest], Any] | None = None

    @property
    def key(self) -> str:
        return self.name or self.kind


class Receiver(Protocol):
    """Takes what the informer receives."""

    def received(self, item: Manifest, *, whole: bool) -> None:
        """Take an object that exists."""

    def deleted(self, item: Manifest) -> None:
        """Take the last state of an object that was deleted, or that lost its labels."""

    def listed(self, places: set[Place], version: int) -> None:
        """Take the places of all objects that existed at a version."""

    def restored(self) -> None:
        """Note that the versions of the API server have become smaller."""


class Pause:
    """How long an informer waits before it asks again (PURE). Times are in seconds, of one clock.

    The pause doubles with each failure. While lists fail, it grows to PAUSE_LAST, as in client-go. While lists succeed and
    only watches fail, the pause is how late users see a change. So it grows only to PAUSE_LISTED, or to ten times what
    the list took: a large list is not repeated often, and neither is one of a slow API server.
    """

    def __init__(self) -> None:
        self._next, self._longest = PAUSE_FIRST, PAUSE_LAST
        self._trusted = 0.0  # from when on an event shows that no more lists are needed

    def listing(self) -> None:
        """Note that everything is listed now. It may fail."""
        self._longest = PAUSE_LAST

    def listed(self, began: float, now: float) -> None:
        """Note that the list has arrived."""
        least = (now - began) / LIST_SHARE
        self._longest = min(max(PAUSE_LISTED, least), PAUSE_LAST)
        self._trusted = now + least

    def received(self, now: float) -> None:
        """Note that a watch works. After a list that took long, it must have worked for longer."""
        if now >= self._trusted:
            self._next = PAUSE_FIRST

    def seconds(self) -> float:
        """Return the seconds until the next attempt, without jitter."""
        found = min(self._next, self._longest)
        self._next = min(found * 2, PAUSE_LAST)
        return found


class Informer:
    """The list and the watch of one source."""

    def __init__(self, kube: Kube, source: Source, receiver: Receiver) -> None:
        self._kube = kube
        self.source = source
        self._receiver = receiver
        self._version = ""  # at which the watch continues; "" if everything must be listed
        self._latest = 0
        self._pause = Pause()
        self.synced = asyncio.Event()
        self.seen = time.monotonic()  # when the API server last answered, for the probe

    async def run(self) -> None:
        """List and watch without end."""
        while True:
            try:
                if not self._version:
                    await self._list()
                if await self._watch():
                    continue
            except BROKEN as error:
                metrics.WATCH_RESTARTS.labels(self.source.key).inc()
                if self.source.optional and isinstance(error, KubeError) and error.status == ABSENT:
                    self.seen = time.monotonic()
                    self.synced.set()
                if outdated(error):
                    self._version = ""
                log.info(
                    "the watch of %s ended and is opened again: %s", self.source.key, error or type(error).__name__
                )
            await asyncio.sleep(self._pause.seconds() * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    async def _list(self) -> None:
        source, places, version = self.source, set[Place](), ""
        began = time.monotonic()
        self._pause.listing()
        async for page in self._kube.pages(
            source.kind, labels=source.labels, only=source.only, metadata_only=not source.listed
        ):
            version = page.version
            if int(version) < self._latest:
                # Lists are read from etcd, so its content was replaced by an older one.
                self._receiver.restored()
                self._latest = 0
            for item in page.items:
                places.add(place_of(item))
                self._receiver.received(item, whole=source.listed)
            self.seen = time.monotonic()
        self._receiver.listed(places, int(version))
        self._pause.listed(began, time.monotonic())
        self._advance(version)
        self.synced.set()

    async def _watch(self) -> bool:
        """Receive events until the watch ends. Return whether anything was received. Raises KubeError."""
        source, alive = self.source, False
        async for event in self._kube.events(
            source.kind, self._version, labels=source.labels, only=source.only, metadata_only=not source.watched
        ):
            self.seen, alive = time.monotonic(), True
            metrics.WATCH_EVENTS.labels(source.key).inc()
            found = event["object"]
            if event["type"] == "ERROR":
                raise KubeError(int(found.get("code") or 500), "Expired", str(found.get("message")))
            if event["type"] == "DELETED":
                self._receiver.deleted(found)
            elif event["type"] != "BOOKMARK":
                self._receiver.received(found, whole=source.watched)
            self._advance(found["metadata"]["resourceVersion"])
            self._pause.received(self.seen)
        self.seen = time.monotonic()
        return alive

    def _advance(self, version: str) -> None:
        self._latest = max(self._latest, int(version))
        self._version = str(self._latest)


def outdated(error: Exception) -> bool:
    """Return whether everything must be listed after this error, because a watch may not continue at its version (PURE)."""
    if isinstance(error, KubeError):
        return error.status not in {0, *BUSY}
    return not isinstance(error, aiohttp.ClientError | TimeoutError | OSError)
