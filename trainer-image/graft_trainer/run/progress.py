"""progress.json and events.jsonl: what the operator and the user see of a run while it goes on.

Uploads happen in a thread of their own: a slow or absent store never holds up training. The latest state wins, so what
could not be sent is simply replaced by what is sent next.
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
LARGE_EVENTS = 512 * 1024  # bytes; above it events.jsonl, which is sent whole, is sent more seldom


class Uploads(Protocol):
    """The one call that the reporter makes to the store."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None: ...


def now() -> str:
    """RFC 3339, UTC, in seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ProgressReporter:
    """Keeps the state of an attempt and uploads it, at most every `interval` seconds; a change of stage goes at once."""

    def __init__(
        self, store: Uploads, prefix: str, attempt: str, *, interval: float = 5.0, silent: bool = False
    ) -> None:
        """A `silent` one uploads nothing: of processes that train together one speaks for all."""
        self._store = store
        self._prefix = prefix
        self._interval = interval
        self._state = Progress(attempt=attempt, stage="Preparing", updated_at=now())
        self._events: list[bytes] = []
        self._events_size = 0
        self._events_sent = 0  # how many of them the store has
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
        """Change fields of the state; it is uploaded with the next beat."""
        with self._wake:
            self._state = self._state.model_copy(update=changes | {"updated_at": now()})
            self._version += 1
            self._wake.notify()

    def stage(self, stage: TrainingStage, **changes: Any) -> None:
        """Enter a stage; the upload starts at once."""
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
        """Send the last state, trying for `patience` seconds; whether the store has it."""
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
            self._store.put(self._prefix + PROGRESS, state.json_text().encode())
            if events:
                self._store.put(self._prefix + EVENTS, b"".join(events))
        except Exception as error:
            # Whatever it is, the next beat tries again; the log shows the first of a row of failures only.
            if not self._failing:
                log.warning("progress could not be uploaded, trying again: %s", error)
            self._failing = True
            return False
        if self._failing:
            log.info("progress is uploaded again")
        self._failing = False
        return True
