"""progress.json and events.jsonl: what the operator and the user see of a run while it is running.

A separate thread uploads them, so a slow or unavailable store never delays training. If an upload fails, the next
upload replaces it with the latest state.
"""

import json
import logging
import threading
import time
from datetime import UTC, datetime
from typing import Any, Protocol

from graft.artifacts.layout import EVENTS, PROGRESS
from graft.contracts.progress import Progress, TrainingStage

log = logging.getLogger(__name__)
# Bytes. A larger events.jsonl is uploaded less often, because each upload sends the whole file.
LARGE_EVENTS = 512 * 1024


class Uploads(Protocol):
    """The only call that the reporter makes to the store."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None: ...


def now() -> str:
    """Return the current time as RFC 3339 in UTC, without fractions of a second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ProgressReporter:
    """Keeps the state of an attempt and uploads it at most every `interval` seconds.

    A change of stage is uploaded at once.
    """

    def __init__(
        self, store: Uploads, prefix: str, attempt: str, *, interval: float = 5.0, silent: bool = False
    ) -> None:
        """With `silent`, nothing is uploaded: if several processes train together, only rank 0 reports."""
        self._store = store
        self._prefix = prefix
        self._interval = interval
        self._state = Progress(attempt=attempt, stage="Preparing", updated_at=now())
        self._events: list[bytes] = []
        self._events_size = 0
        self._events_sent = 0  # number of events that the store has
        self._events_due = 0.0
        self._version = 0
        self._sent = 0
        self._urgent = False
        self._closing = False
        self._failing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._upload_forever, name="progress", daemon=True)
        self._silent = silent
        if not silent:
            self._thread.start()

    @property
    def state(self) -> Progress:
        with self._wake:
            return self._state

    def update(self, **changes: Any) -> None:
        """Change fields of the state. The next periodic upload sends them."""
        with self._wake:
            self._state = self._state.model_copy(update=changes | {"updated_at": now()})
            self._version += 1
            self._wake.notify()

    def stage(self, stage: TrainingStage, **changes: Any) -> None:
        """Enter a stage. The upload starts at once."""
        if not self._silent:
            log.info("stage: %s", stage)
        with self._wake:
            self._urgent = True
        self.update(stage=stage, **changes)

    def event(self, **record: Any) -> None:
        """Append a line to events.jsonl."""
        line = json.dumps({"time": now()} | record).encode() + b"\n"
        with self._wake:
            self._events.append(line)
            self._events_size += len(line)
            self._version += 1
            self._wake.notify()

    def close(self, patience: float) -> bool:
        """Upload the last state, with retries for `patience` seconds. Return whether the store has it."""
        if self._silent:
            return True
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)
        with self._wake:
            return self._sent == self._version

    def _upload_forever(self) -> None:
        last = float("-inf")
        while True:
            with self._wake:
                while not self._ready(last):
                    left = last + self._interval - time.monotonic()
                    self._wake.wait(left if left > 0 and self._sent != self._version else None)
                if self._closing and self._sent == self._version:
                    return
                version, state, urgent = self._version, self._state, self._urgent
                self._urgent = False
                events = self._due_events(urgent or self._closing)
            sent = self._upload(state, events)
            last = time.monotonic()
            if sent:
                with self._wake:
                    self._sent = version
                    self._events_sent = max(self._events_sent, len(events))
            elif self._closing:
                time.sleep(0.5)

    def _ready(self, last: float) -> bool:
        if self._closing:
            return True
        return self._sent != self._version and (self._urgent or time.monotonic() - last >= self._interval)

    def _due_events(self, urgent: bool) -> list[bytes]:
        if len(self._events) == self._events_sent or not (urgent or time.monotonic() >= self._events_due):
            return []
        self._events_due = time.monotonic() + self._interval * (self._events_size // LARGE_EVENTS)
        return list(self._events)

    def _upload(self, state: Progress, events: list[bytes]) -> bool:
        try:
            # update() does not validate: the texts of errors are cut here to what the operator reads.
            bounded = Progress.model_validate_json(state.json_text())
            self._store.put(self._prefix + PROGRESS, bounded.json_text().encode())
            if events:
                self._store.put(self._prefix + EVENTS, b"".join(events))
        except Exception as error:
            # The next periodic upload retries after any error. Only the first of consecutive failures is logged.
            if not self._failing:
                log.warning("progress could not be uploaded, retrying: %s", error)
            self._failing = True
            return False
        if self._failing:
            log.info("progress is uploaded again")
        self._failing = False
        return True
