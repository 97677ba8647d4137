"""Report the transitions of conditions as Kubernetes Events. It does not know when a status is written.

A condition that becomes True or False is reported before its status is written, so a crash between the two writes
repeats the Event instead of losing it. The Event's name is derived from the transition, so the API server refuses the
repetition. A condition that becomes Unknown (the resource is still in progress) is reported in the background: such an
Event may be lost in a crash. A transition that repeats within QUIET seconds is counted in the series of its Event.
"""

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from graft import status as conditions
from graft.api.meta import Condition
from graft.kube import Kube, Manifest

log = logging.getLogger(__name__)

# Reasons with which a condition is False although nothing is wrong. Their Events are not warnings.
EXPECTED = {"Complete", "ScaledToZero", "NotServed", "Archived", "Restoring", "Expiring", "Pruned", "BaseModelNotReady"}
# Condition types and reasons for which no Event is written: the status has them, and nobody has to act.
# NotAccepted repeats the Event of the condition Accepted.
SILENT = {"InUse", "Needed", "Kept", "Preparing", "Publishing", "NotAccepted"}
# Reasons that every resource has at first. Later they are news, for example when a failed job is restarted.
FIRST = {"Resolved", "Pending", "Verifying", "AsExpected"}
QUIET = 360.0  # seconds; as in client-go, a series ends when it does not repeat for so long
MOST_WAITING = 1_000  # Events that wait to be written in the background
MOST_RECENT = 10_000  # transitions that are remembered for their series; each costs about 500 bytes


@dataclass(frozen=True)
class Transition:
    """A condition of a resource that has another status or reason than before."""

    regarding: Manifest
    condition: Condition
    at: str  # RFC 3339

    @property
    def settled(self) -> bool:
        """Whether the condition is True or False, so the Event must not be lost."""
        return self.condition.status != "Unknown"

    @property
    def warning(self) -> bool:
        wrong = "True" if self.condition.type == "Degraded" else "False"
        return self.condition.status == wrong and self.condition.reason not in EXPECTED

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """What repetitions of a transition have in common."""
        return self.regarding["metadata"]["uid"], self.condition.type, self.condition.status, self.condition.reason

    @property
    def name(self) -> str:
        """The name of the Event. A transition that is computed again from the same resourceVersion has the same name."""
        metadata = self.regarding["metadata"]
        told = "\n".join((*self.kind, str(metadata.get("resourceVersion"))))
        return f"{metadata['name'][:200]}.{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def transitions(regarding: Manifest, old: Sequence[Condition], new: Iterable[Condition], at: str) -> list[Transition]:
    """Return the transitions that become Events (PURE)."""
    before = {item.type for item in old}
    found = []
    for item in conditions.transitions(old, new):
        expected = item.reason in FIRST and item.type not in before
        if not expected and not {item.type, item.reason} & SILENT:
            found.append(Transition(regarding, item, at))
    return found


@dataclass
class _Series:
    """The Event of a transition, and how often the transition was seen."""

    name: str
    count: int
    last: float  # seconds


class News:
    """The Events of one operator process."""

    def __init__(self, kube: Kube, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube, self._clock = kube, clock
        self._recent: OrderedDict[tuple[str, str, str, str], _Series] = OrderedDict()
        self._waiting: deque[Transition] = deque()
        self._writer: asyncio.Task[None] | None = None

    async def report(self, found: Iterable[Transition]) -> None:
        """Write the Events now. An Event that the API server refuses is only logged."""
        await asyncio.gather(*map(self._write, found))

    def later(self, found: Iterable[Transition]) -> None:
        """Write the Events in the background, in order. If too many wait, the oldest is dropped."""
        self._waiting.extend(found)
        while len(self._waiting) > MOST_WAITING:
            log.warning("more than %d Events wait, one is dropped: %s", MOST_WAITING, self._waiting.popleft().name)
        if self._waiting and (self._writer is None or self._writer.done()):
            self._writer = asyncio.create_task(self._write_waiting(), name="events")

    async def stop(self, seconds: float = 2.0) -> None:
        """Write the Events that wait, for at most so many seconds."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=seconds)
            self._writer.cancel()

    async def _write_waiting(self) -> None:
        while self._waiting:
            try:
                await self._write(self._waiting.popleft())
            except Exception as error:
                log.warning("cannot write an Event: %r", error)

    async def _write(self, found: Transition) -> None:
        seen, now = self._recent.pop(found.kind, None), self._clock()
        if seen is None or now - seen.last > QUIET:
            seen = _Series(found.name, 1, now)
        elif seen.name != found.name:  # the same name: the write of the status failed, and the transition is repeated
            seen = _Series(seen.name, seen.count + 1, now)
        self._recent[found.kind] = seen
        if len(self._recent) > MOST_RECENT:
            self._recent.popitem(last=False)
        if seen.count == 1:
            await self._kube.event(
                found.regarding, found.name, found.condition.reason, found.condition.message, found.at,
                warning=found.warning,
            )  # fmt: skip
        elif seen.count & (seen.count - 1) == 0:  # the count is written when it has doubled: 2, 4, 8
            await self._kube.count_event(found.regarding, seen.name, seen.count, found.at)
