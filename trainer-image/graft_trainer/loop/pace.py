"""The speed of training (PURE): tokens per second and the remaining time, from the latest steps."""

import time
from collections import deque
from collections.abc import Callable

WINDOW = 30.0  # seconds over which the speed is measured
FEWEST = 3  # steps before a speed is reported


class Pace:
    """Speed over the last WINDOW seconds.

    The speed excludes pauses for evaluation; the remaining time includes them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int, int]] = deque()  # (training seconds, step, tokens)
        self._start = clock()
        self._paused = 0.0
        self._pauses = 0

    def step(self, step: int, tokens: int) -> None:
        """Record that `step` optimizer steps are done, with `tokens` tokens in total."""
        at = self._clock() - self._start - self._paused
        self._marks.append((at, step, tokens))
        while len(self._marks) > FEWEST + 1 and at - self._marks[1][0] > WINDOW:
            self._marks.popleft()

    def pause(self, seconds: float) -> None:
        """Record that an evaluation took `seconds`."""
        self._paused += seconds
        self._pauses += 1

    def tokens_per_second(self) -> float | None:
        if len(self._marks) <= FEWEST:
            return None
        (begin, _, before), (end, _, after) = self._marks[0], self._marks[-1]
        return round((after - before) / (end - begin), 1) if end > begin else None

    def eta_seconds(self, total_steps: int, pauses_left: int = 0) -> int | None:
        """Return the seconds until the last step, including `pauses_left` evaluations."""
        if len(self._marks) <= FEWEST:
            return None
        (begin, before, _), (end, after, _) = self._marks[0], self._marks[-1]
        seconds = (total_steps - after) * (end - begin) / (after - before)
        if self._pauses:
            seconds += pauses_left * self._paused / self._pauses
        return max(0, round(seconds))
