"""Remember how long to wait before work that failed is repeated: the pauses double.

Nothing is remembered across a restart of the operator. The first attempt then follows at once.
"""

import time
from collections.abc import Callable

FIRST = 5.0  # seconds
LAST = 300.0  # seconds
OUTAGE = 60.0  # seconds; the longest pause while the store is unavailable


class Backoff:
    """The pauses after failures, by resource."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: dict[str, tuple[int | None, int, float]] = {}  # uid -> generation, failures, time of the retry

    def failed(self, uid: str, generation: int | None, longest: float = LAST) -> float:
        """Record a failure. Return the seconds until the next attempt, at most `longest`."""
        before, failures, _ = self._failed.get(uid, (generation, 0, 0.0))
        failures = failures + 1 if before == generation else 1
        pause = min(longest, FIRST * 2.0 ** min(failures - 1, 16))
        self._failed[uid] = (generation, failures, self._clock() + pause)
        return pause

    def left(self, uid: str, generation: int | None) -> float:
        """Return the seconds until the next attempt, 0 if it may begin now. A changed spec may be tried at once."""
        before, _, due = self._failed.get(uid, (None, 0, 0.0))
        return max(0.0, due - self._clock()) if before == generation else 0.0

    def forget(self, uid: str) -> None:
        """Drop what is known about a resource: the work succeeded, or the resource is deleted."""
        self._failed.pop(uid, None)
