"""The goals of the operator's benchmark, and their results as JSON and as a table."""

import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.train.results import write


@dataclass
class Goal:
    """One measured value and its bound. `least`: the bound is a minimum. Without a bound the value is only reported."""

    name: str
    value: float
    bound: float | None = None
    unit: str = ""
    least: bool = False
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value >= self.bound if self.least else self.value <= self.bound

    def line(self) -> str:
        """Return the value, the bound, and whether the value meets it."""
        text = f"{self.value:.4g} {self.unit}".strip()
        if self.bound is None:
            return text
        side = ">=" if self.least else "<="
        return f"{text}, goal: {side} {self.bound:g}, {'met' if self.met else 'MISSED'}"


def verdicts(goals: list[Goal]) -> list[dict[str, Any]]:
    """Return the goals as they are written: name, value, goal, met and more."""
    rows = [asdict(goal) | {"goal": goal.bound, "met": goal.met} for goal in goals]
    for row in rows:
        row.pop("bound")
    return rows


def save(goals: list[Goal], options: dict[str, int], began: float) -> None:
    """Write build/bench/operator.json."""
    seconds = round(time.monotonic() - began)
    write("operator", {"options": options, "load": os.getloadavg(), "seconds": seconds, "goals": verdicts(goals)})
