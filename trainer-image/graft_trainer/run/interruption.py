"""SIGTERM: the kubelet asks the pod to end, and how long what is still to be done may take.

Kubernetes sends SIGKILL after terminationGracePeriodSeconds, 120 s for training pods. Most of that is for the last
checkpoint; where there is none to write the process ends at once.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from graft_trainer.run.failures import Interrupted

PROMPT = 8.0  # seconds after which a process is ended that is stuck in native code
LONGEST = 100.0  # seconds for the step that goes on and the checkpoint after it


class Interruption:
    """Raises Interrupted in the main thread at SIGTERM, or, where that is deferred, only says that it is wanted."""

    def __init__(self) -> None:
        self.wanted = False
        self._deferred = 0
        self._holding: list[Callable[[], bool]] = []

    def listen(self, give_up: Callable[[], int]) -> None:
        """Handle SIGTERM from now on. `give_up` leaves a message and gives the exit code when nothing else helps."""

        def handle(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.wanted = True
            threading.Thread(target=self._watch, args=(give_up,), name="grace", daemon=True).start()
            if not self._deferred:
                raise Interrupted

        signal.signal(signal.SIGTERM, handle)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within it SIGTERM only sets `wanted`; at its end Interrupted is raised if it did."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self.wanted and not self._deferred:
            raise Interrupted

    def hold(self, busy: Callable[[], bool]) -> None:
        """Give the process the longer time while `busy` says so."""
        self._holding.append(busy)

    def _watch(self, give_up: Callable[[], int]) -> None:
        begin = time.monotonic()
        while (passed := time.monotonic() - begin) < LONGEST:
            if passed >= PROMPT and not self._deferred and not any(busy() for busy in self._holding):
                break
            time.sleep(0.2)
        os._exit(give_up())
