"""How fast training goes (PURE): tokens per second and the time that is left, from what was just seen."""

import time
from collections import deque
from collections.abc import Callable

WINDOW = 30.0  # seconds that a speed is taken over
FEWEST = 3  # steps before anything is said


class Pace:
    """Speed over the last WINDOW seconds; pauses for evaluation are taken out of the speed and added to the time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int, int]] = deque()  # (training seconds, step, tokens)
        self._start = clock()
        self._paused = 0.0
        self._pauses = 0

    def step(self, step: int, tokens: int) -> None:
        """`step` optimizer steps are done, with `tokens` tokens in all."""
        at = self._clock() - self._start - self._paused
        self._marks.append((at, step, tokens))
        while len(self._marks) > FEWEST + 1 and at - self._marks[1][0] > WINDOW:
            self._marks.popleft()

    def pause(self, seconds: float) -> None:
        """An evaluation took so long."""
        self._paused += seconds
        self._pauses += 1

    def tokens_per_second(self) -> float | None:
        if len(self._marks) <= FEWEST:
            return None
        (begin, _, before), (end, _, after) = self._marks[0], self._marks[-1]
        return round((after - before) / (end - begin), 1) if end > begin else None

    def eta_seconds(self, total_steps: int, pauses_left: int = 0) -> int | None:
        """Seconds until the last step, with the evaluations that are still to come."""
        if len(self._marks) <= FEWEST:
            return None
        (begin, before, _), (end, after, _) = self._marks[0], self._marks[-1]
        seconds = (total_steps - after) * (end - begin) / (after - before)
        if self._pauses:
            seconds += pauses_left * self._paused / self._pauses
        return max(0, round(seconds))
