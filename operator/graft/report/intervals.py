"""Intervals of scores (PURE): where the score of endless tasks of the same kind lies, with a confidence of 95 %."""

import math

from graft.report.document import Precision

Z = 1.959964  # quantile of the normal distribution for a confidence of 95 %
COUNTED = frozenset({"exactMatch", "accuracy", "toolCallAccuracy"})  # each task is right or wrong
Interval = tuple[float, float]


def interval(metric: str, value: float, precision: Precision, *, share: bool) -> Interval | None:
    """Return the interval of a score, None if too little is known. `share`: the score is from 0 to 1.

    Counted metrics have the score interval of Wilson (1927), which holds for few tasks and for shares of 0 and 1. Other
    metrics have the normal interval around the mean.
    """
    if metric in COUNTED:
        return wilson(value, precision.n) if precision.n > 0 else None
    if precision.standard_error is None:
        return None
    half = Z * precision.standard_error
    return max(0.0, value - half), min(1.0, value + half) if share else value + half


def wilson(share: float, n: int) -> Interval:
    """Return the score interval of a share of `n` tasks (Wilson 1927)."""
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
