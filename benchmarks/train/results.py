"""The results of a benchmark: JSON under build/bench/ and a printed table."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks.train.recipe import REPOSITORY

FOLDER = REPOSITORY / "build/bench"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the rounds' ratios. The runs of a round are close in time, so other load on the machine
    affects both."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> str:
    """Return the median, the minimum and the maximum as text."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def write(name: str, found: dict[str, Any]) -> None:
    """Write build/bench/<name>.json, with the machine and the time."""
    import torch

    FOLDER.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    record = {"benchmark": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), **machine, **found}
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a table."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def verdict(value: float, bound: float, *, least: bool) -> str:
    """Return the value, its bound, and whether the value meets the bound."""
    good = value >= bound if least else value <= bound
    return f"{value:.3f}, required: at {'least' if least else 'most'} {bound:.2f}, {'met' if good else 'MISSED'}"
