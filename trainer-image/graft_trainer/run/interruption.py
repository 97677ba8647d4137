"""The handling of SIGTERM, and how long the process may run after it.

Kubernetes sends SIGKILL after terminationGracePeriodSeconds, 120 s for training pods. Most of this time is for the last
checkpoint. If there is no checkpoint to write, the process ends at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from graft_trainer.run.failures import Interrupted

PROMPT = 8.0  # seconds until a process that is stuck in native code is ended
LONGEST = 100.0  # seconds for the current step and the checkpoint after it


class Interruption:
    """Raises Interrupted in the main thread at SIGTERM. While deferred, it only sets `wanted`."""

    def __init__(self) -> None:
        self.wanted = False
        self._deferred = 0
        self._holding: list[Callable[[], bool]] = []

    def listen(self, give_up: Callable[[], int]) -> None:
        """Handle SIGTERM from now on.

        If the process does not end in time, `give_up` reports it and returns the exit code.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.wanted = True
            threading.Thread(target=self._watch, args=(give_up,), name="grace", daemon=True).start()
            if not self._deferred:
                raise Interrupted

        signal.signal(signal.SIGTERM, handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer SIGTERM: within this context it only sets `wanted`.

        After the context, Interrupted is raised if it is set.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.wanted and not self._deferred:
            raise Interrupted

    def hold(self, busy: Callable[[], bool]) -> None:
        """Allow the process LONGEST instead of PROMPT seconds while `busy` returns True."""
        self._holding.append(busy)

    def _watch(self, give_up: Callable[[], int]) -> None:
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < LONGEST:
            if passed >= PROMPT and not self._deferred and not any(busy() for busy in self._holding):
                break
            time.sleep(0.2)
        os._exit(give_up())
