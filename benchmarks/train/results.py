"""What a benchmark found: JSON under build/bench/ and a table for people."""

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
    """The median of the rounds' ratios: the runs of a round stand beside each other in time, so what else the machine does
    is in both."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def write(name: str, found: dict[str, Any]) -> None:
    """build/bench/<name>.json, with where and when."""
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
    """A table."""
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def verdict(value: float, bound: float, *, least: bool) -> str:
    """The value beside its bound."""
    good = value >= bound if least else value <= bound
    return f"{value:.3f}, wanted at {'least' if least else 'most'} {bound:.2f}: {'met' if good else 'MISSED'}"
