"""What the agent remembers between two looks: failures, idleness, and whether the pod became ready (no I/O)."""

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from graft.contracts.agent import Wanted

from graft_server.agent.decisions.decide import loaded
from graft_server.agent.decisions.reasons import FAILED, SELDOM, AdapterReason

SOON = (1.0, 30.0)  # seconds before the first retry, and at most
LATE = (10.0, 600.0)  # where nothing changes by itself, but for bytes that something on the way has changed
LONGEST_ASKED = 120.0  # of the seconds that a store asks for


@dataclass
class Failure:
    """The last failure of an adapter, kept until it succeeds: a retry that runs does not hide it."""

    reason: AdapterReason
    message: str
    attempts: int
    retry_at: float

    @property
    def final(self) -> bool:
        """Whether waiting does not help: nobody waits for the adapter."""
        return self.reason in FAILED


class Failures:
    """Failures by adapter, each with its own back-off."""

    def __init__(self) -> None:
        self._by_name: dict[str, Failure] = {}

    def get(self, name: str) -> Failure | None:
        return self._by_name.get(name)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._by_name)

    def add(
        self, name: str, reason: AdapterReason, message: str, now: float, *, retry_after: float | None = None
    ) -> Failure:
        """Note a failed action and when to try again: later each time, and not all pods at once."""
        before = self._by_name.get(name)
        attempts = before.attempts + 1 if before and (before.reason in SELDOM) == (reason in SELDOM) else 1
        first, most = LATE if reason in SELDOM else SOON
        delay = min(most, first * 2 ** min(attempts - 1, 10)) * random.uniform(0.7, 1.0)  # noqa: S311
        delay = max(delay, min(retry_after or 0.0, LONGEST_ASKED))
        failure = Failure(reason, message[:1000], attempts, now + delay)
        self._by_name[name] = failure
        return failure

    def note(self, name: str, reason: AdapterReason, message: str) -> bool:
        """Note what is found at every look, so nothing is held back for it; whether it is new."""
        before = self._by_name.get(name)
        if before is not None and before.reason == reason:
            return False  # the first message stays: figures that change by the second would be news each time
        self._by_name[name] = Failure(reason, message[:1000], 0, 0.0)
        return True

    def clear(self, name: str) -> None:
        self._by_name.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all others."""
        self._by_name = {name: failure for name, failure in self._by_name.items() if name in names}

    def retry_now(self, reasons: Collection[AdapterReason] | None = None) -> None:
        """Something changed that may have cured them, or those of such reasons: they wait no longer."""
        for failure in self._by_name.values():
            if reasons is None or failure.reason in reasons:
                failure.attempts, failure.retry_at = 0, 0.0

    def held_back(self, now: float) -> frozenset[str]:
        """Names whose time to try again has not come."""
        return frozenset(name for name, failure in self._by_name.items() if failure.retry_at > now)

    def next_retry(self, now: float) -> float | None:
        """Seconds until the first of them may be tried again."""
        waits = [failure.retry_at - now for failure in self._by_name.values() if failure.retry_at > now]
        return min(waits, default=None)


class Idleness:
    """Since when the adapters that are to go have been idle."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def see(self, leaving: Iterable[str], active: Collection[str] | None, now: float) -> None:
        """`active` None: it is not known what runs, so no one counts as idle."""
        if active is None:
            self._since = {}
            return
        self._since = {name: self._since.get(name, now) for name in leaving if name not in active}

    def drained(self, seconds: float, now: float) -> frozenset[str]:
        """Those that have been idle for so long."""
        return frozenset(name for name, since in self._since.items() if now - since >= seconds)


@dataclass
class Readiness:
    """Whether the engine's present process has what it needs.

    Required is what was wanted when this start of the engine was first seen. Once all of that was loaded, or has failed for
    good, the pod is ready until the engine starts again: an adapter that is added later makes no ready pod unready.
    """

    started: bool = False  # a start of the engine was seen
    required: frozenset[str] | None = None  # None until something was wanted
    complete: bool = False
    had: frozenset[str] = field(default_factory=frozenset)  # wanted adapters that the engine was seen to have

    def restarted(
        self, wanted: Wanted | None, engine: Mapping[str, str], adapters_dir: str, busy: Collection[str], other: bool
    ) -> bool:
        """Whether this is another process of the engine than the one seen before.

        It is when an adapter is missing that nobody took away. `other`: the process went away in between, or says so
        itself; that counts where nothing was loaded by which it could be told.
        """
        if not self.started:
            return True
        adapters = wanted.adapters if wanted else []
        missing = [
            adapter.engine_name
            for adapter in adapters
            if adapter.engine_name in self.had
            and adapter.engine_name not in busy
            and not loaded(adapter, engine, adapters_dir)
        ]
        return bool(missing) or (other and not self.had)

    def start(self) -> None:
        """A new process of the engine: everything is required again."""
        self.started, self.required, self.complete, self.had = True, None, False, frozenset()

    def see(self, wanted: Wanted | None, engine: Mapping[str, str], adapters_dir: str, failures: Failures) -> bool:
        """Note what is there; whether the pod is ready, given that the engine answers."""
        if wanted is None or not self.started:
            return False
        by_name = {adapter.engine_name: adapter for adapter in wanted.adapters}
        self.had = frozenset(name for name, adapter in by_name.items() if loaded(adapter, engine, adapters_dir))
        if self.required is None:
            self.required = frozenset(by_name)
        if not self.complete:
            waiting = [
                name
                for name in self.required & set(by_name)
                if name not in self.had and not ((failure := failures.get(name)) and failure.final)
            ]
            self.complete = not waiting
        return self.complete
