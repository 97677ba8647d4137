"""The speed of training (PURE): tokens per second and the remaining time."""

import time
from bisect import bisect_right
from collections.abc import Callable

WINDOW = 30.0  # seconds over which the speed is measured
FEWEST = 3  # steps before a speed is reported
DENSITY = 0.01  # the time between two marks, as a share of the time since the start: few marks in a long run


class Pace:
    """Speed over the last WINDOW seconds, and the remaining time by the speed in the second half of the training so far.

    The remaining steps are expected to have as many tokens as a step has on average. In a short run, the measured steps may
    have many more or fewer. The speed excludes evaluations. The remaining time includes them: each takes as long as the
    earlier ones did, or as long as expected.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: list[tuple[float, int, int]] = []  # (training seconds, step, tokens); the last is the newest
        self._start = clock()
        self._paused = 0.0
        self._measured: list[float] = []  # seconds of each evaluation
        self._expected: float | None = None

    def step(self, step: int, tokens: int) -> None:
        """Record that `step` optimizer steps are done, with `tokens` tokens in total."""
        at = self._clock() - self._start - self._paused
        # The first steps are slower and are kept, so that a speed never covers only them.
        if len(self._marks) > FEWEST + 1 and at - self._marks[-2][0] < DENSITY * at:
            self._marks.pop()
        self._marks.append((at, step, tokens))

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` from the speed."""
        self._paused += seconds

    def expect(self, seconds: float) -> None:
        """Record how long an evaluation is expected to take, from a part of its examples."""
        self._expected = seconds

    def evaluated(self, seconds: float) -> None:
        """Record that an evaluation took `seconds`."""
        self.pause(seconds)
        self._measured.append(seconds)

    @property
    def knows_evaluations(self) -> bool:
        """Whether an evaluation was measured or is expected to take a known time."""
        return bool(self._measured) or self._expected is not None

    def tokens_per_second(self) -> float | None:
        if len(self._marks) <= FEWEST:
            return None
        (begin, _, before), (end, _, after) = self._mark(self._marks[-1][0] - WINDOW), self._marks[-1]
        return round((after - before) / (end - begin), 1) if end > begin else None

    def eta_seconds(self, total_steps: int, tokens_per_step: float, evaluations: int = 0) -> int | None:
        """Return the seconds until `total_steps` steps, of `tokens_per_step` tokens on average, and `evaluations` more
        evaluations are done."""
        if len(self._marks) <= FEWEST:
            return None
        end, steps, after = self._marks[-1]
        begin, _, before = self._mark(min(end / 2, end - WINDOW))
        seconds = (total_steps - steps) * tokens_per_step * (end - begin) / max(1, after - before)
        if self._measured:
            seconds += evaluations * sum(self._measured) / len(self._measured)
        elif self._expected is not None:
            seconds += evaluations * self._expected
        return max(0, round(seconds))

    def _mark(self, at: float) -> tuple[float, int, int]:
        """Return the last mark up to this time. It is at least FEWEST marks old, and not the start if possible."""
        index = bisect_right(self._marks, at, key=lambda mark: mark[0]) - 1
        # The first step includes what happens only once, such as the allocation of memory.
        return self._marks[max(0 if len(self._marks) == FEWEST + 1 else 1, min(index, len(self._marks) - 1 - FEWEST))]
