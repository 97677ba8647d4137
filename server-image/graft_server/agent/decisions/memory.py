"""The agent's memory between two rounds: failures, idle adapters, and whether the pod became ready (no I/O)."""

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from graft.contracts.agent import Wanted

from graft_server.agent.decisions.decide import loaded
from graft_server.agent.decisions.reasons import FAILED, SELDOM, AdapterReason

SOON = (1.0, 30.0)  # seconds before the first retry, and the longest delay
LATE = (10.0, 600.0)  # the same for SELDOM. They are retried too, because the network may have altered bytes
LONGEST_ASKED = 120.0  # seconds, limit of a store's Retry-After


@dataclass
class Failure:
    """The last failure of an adapter. It is kept until an action succeeds, so a running retry does not hide it."""

    reason: AdapterReason
    message: str
    attempts: int
    retry_at: float

    @property
    def final(self) -> bool:
        """Return whether waiting does not help. The pod then becomes ready without the adapter."""
        return self.reason in FAILED


class Failures:
    """The failures by engine name, each with its own back-off."""

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
        """Record a failed action and the time of its retry. The delay grows each time, with jitter between the pods."""
        before = self._by_name.get(name)
        attempts = before.attempts + 1 if before and (before.reason in SELDOM) == (reason in SELDOM) else 1
        first, most = LATE if reason in SELDOM else SOON
        delay = min(most, first * 2 ** min(attempts - 1, 10)) * random.uniform(0.7, 1.0)  # noqa: S311
        delay = max(delay, min(retry_after or 0.0, LONGEST_ASKED))
        failure = Failure(reason, message[:1000], attempts, now + delay)
        self._by_name[name] = failure
        return failure

    def note(self, name: str, reason: AdapterReason, message: str) -> bool:
        """Record a failure that every round finds again, so it needs no delay. Return whether it is new."""
        before = self._by_name.get(name)
        if before is not None and before.reason == reason:
            return False  # keep the first message: its numbers change every round, and each change would be written
        self._by_name[name] = Failure(reason, message[:1000], 0, 0.0)
        return True

    def clear(self, name: str) -> None:
        self._by_name.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the failures of all other names."""
        self._by_name = {name: failure for name, failure in self._by_name.items() if name in names}

    def retry_now(self, reasons: Collection[AdapterReason] | None = None) -> None:
        """End the delay of all failures, or of those with one of `reasons`, after a change that may fix them."""
        for failure in self._by_name.values():
            if reasons is None or failure.reason in reasons:
                failure.attempts, failure.retry_at = 0, 0.0

    def held_back(self, now: float) -> frozenset[str]:
        """Return the names whose retry is not due."""
        return frozenset(name for name, failure in self._by_name.items() if failure.retry_at > now)

    def next_retry(self, now: float) -> float | None:
        """Return the seconds until the next retry is due, or None if no failure is waiting."""
        waits = [failure.retry_at - now for failure in self._by_name.values() if failure.retry_at > now]
        return min(waits, default=None)


class Idleness:
    """Since when the adapters that drain have been idle."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def see(self, leaving: Iterable[str], active: Collection[str] | None, now: float) -> None:
        """Record the idle adapters. If `active` is None, the requests are unknown, and no adapter counts as idle."""
        if active is None:
            self._since = {}
            return
        self._since = {name: self._since.get(name, now) for name in leaving if name not in active}

    def drained(self, seconds: float, now: float) -> frozenset[str]:
        """Return the names that have been idle for at least `seconds`."""
        return frozenset(name for name, since in self._since.items() if now - since >= seconds)


@dataclass
class Readiness:
    """Whether the current process of the engine has its required adapters.

    Required are the adapters that were wanted when this start of the engine was first observed. When each of them is
    loaded or Failed, the pod is ready until the engine starts again. An adapter that is added later does not make the
    pod unready.
    """

    started: bool = False  # a start of the engine was observed
    required: frozenset[str] | None = None  # None until the wanted adapters are known
    complete: bool = False
    had: frozenset[str] = field(default_factory=frozenset)  # wanted adapters, loaded when last observed

    def restarted(
        self, wanted: Wanted | None, engine: Mapping[str, str], adapters_dir: str, busy: Collection[str], other: bool
    ) -> bool:
        """Return whether the engine has started again since the last observation.

        It has if a loaded adapter is missing and no action of the agent runs for it. `other`: the engine did not answer
        in between, and its start time differs or is unknown. `other` counts only if no adapter was loaded before.
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
        """Record a start of the engine. All wanted adapters are required again."""
        self.started, self.required, self.complete, self.had = True, None, False, frozenset()

    def see(self, wanted: Wanted | None, engine: Mapping[str, str], adapters_dir: str, failures: Failures) -> bool:
        """Record the loaded adapters. Return whether the pod is ready, provided that the engine answers."""
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
