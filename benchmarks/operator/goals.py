"""The goals of the operator's benchmark, and their results as JSON and as a table."""

import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.train.results import show, write


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


def report(goals: list[Goal], options: dict[str, Any], began: float) -> bool:
    """Write build/bench/operator.json, and print the table. Return whether every goal is met."""
    rows = [asdict(goal) | {"goal": goal.bound, "met": goal.met} for goal in goals]
    for row in rows:
        row.pop("bound")
    found = {"options": options, "load": os.getloadavg(), "seconds": round(time.monotonic() - began), "goals": rows}
    write("operator", found)
    show("operator", [(goal.name, goal.line()) for goal in goals])
    return all(goal.met is not False for goal in goals)
