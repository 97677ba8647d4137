"""Prints two tables before pytest's own summary: what the tests in the folders `attacks` have tried, and how long the tests of
each folder took."""

import inspect
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RESULTS: dict[str, list[str]] = defaultdict(list)  # what is attacked and how it is refused -> outcomes
# folder -> seconds of each test with its fixtures, and CPU seconds of the whole machine meanwhile
TIMES: dict[str, list[tuple[float, float]]] = defaultdict(list)
TICK = os.sysconf("SC_CLK_TCK")


def _used() -> float:
    """Return the CPU seconds that all processes of the machine have used. Clusters of tests are such processes."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    user, nice, system, _idle, _waiting, interrupts, soft, stolen = fields
    return (user + nice + system + interrupts + soft + stolen) / TICK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    began, used = time.monotonic(), _used()
    result = yield
    folder = str(item.path.parent.relative_to(HERE)) if item.path.is_relative_to(HERE) else str(item.path.parent)
    TIMES[folder].append((time.monotonic() - began, _used() - used))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if "attacks" in item.path.parts and (report.when == "call" or report.failed):
        function = getattr(item, "function", None)
        told = inspect.getdoc(function) or item.name.partition("[")[0].removeprefix("test_").replace("_", " ")
        RESULTS[" ".join(told.split())].append(report.outcome)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RESULTS:
        terminalreporter.section("attacks and how they are refused")
        for told, outcomes in RESULTS.items():
            held = sum(outcome == "passed" for outcome in outcomes)
            verdict = "refused" if held == len(outcomes) else "NOT REFUSED"
            terminalreporter.write_line(f"{verdict:<12} {held}/{len(outcomes)}  {told}")
    if len(TIMES) > 1:
        terminalreporter.section("time of each folder: seconds, cores that were busy, tests")
        for folder, times in sorted(TIMES.items(), key=lambda item: -sum(wall for wall, _ in item[1])):
            wall, used = (sum(column) for column in zip(*times, strict=True))
            terminalreporter.write_line(f"{wall:8.0f} {used / max(wall, 0.01):6.1f} {len(times):6}  {folder}")
